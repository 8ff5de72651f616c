// Which instruction set the CPU kernels use: the best the machine has, or the one DARKMATTER_CPU_ISA names.
#pragma once

namespace darkmatter {

enum class Isa { scalar, avx2, avx512, vnni };  // vnni: AVX-512 with 8-bit dot products

const char* isa_name(Isa isa);
Isa best_isa();    // of this machine
Isa active_isa();  // in use, decided at the first call; throws std::runtime_error for a bad DARKMATTER_CPU_ISA

}  // namespace darkmatter
