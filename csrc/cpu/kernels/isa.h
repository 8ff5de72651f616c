// Which instruction set the CPU kernels use: the best the machine has, or the one DARKMATTER_CPU_ISA names.
#pragma once

namespace darkmatter::cpu {

// avx_vnni: AVX2 with integer dot products on 32-byte vectors; vnni: AVX-512 with those on 64-byte ones; amx: in tiles.
enum class Isa { scalar, avx2, avx_vnni, avx512, vnni, amx };

constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx_vnni, Isa::avx512, Isa::vnni, Isa::amx};  // the best last

const char* isa_name(Isa isa);
bool supports(Isa isa);  // this machine
Isa best_isa();          // of this machine
Isa active_isa();        // in use, decided at the first call; throws std::runtime_error for a bad DARKMATTER_CPU_ISA

}  // namespace darkmatter::cpu
