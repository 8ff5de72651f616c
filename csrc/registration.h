// How ops register, and what their caller reads where torch itself fails within one.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace darkmatter {

// The first line of what torch says of this thread's last failure; empty before torch 2.13, whose stable ABI added it
// (the library is built for an older one).
inline std::string torch_reason() {
  static const auto what =
      reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const std::string text = what == nullptr ? "" : what();
  return text.substr(0, text.find('\n'));
}

// A failed call of torch is an error that names a line of its headers. Its caller needs the reason, most often that
// there is no more memory.
template <void (*op)(StableIValue*, uint64_t, uint64_t)>
void with_torch_reason(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  try {
    op(stack, n_arguments, n_results);
  } catch (const std::runtime_error& error) {
    const bool is_of_torch = std::string(error.what()).find(" API call failed at ") != std::string::npos;
    const std::string reason = is_of_torch ? torch_reason() : "";
    if (reason.empty()) {
      throw;
    }
    throw std::runtime_error(reason);
  }
}

}  // namespace darkmatter

#define DARKMATTER_OP(function) (&darkmatter::with_torch_reason<TORCH_BOX(function)>)
