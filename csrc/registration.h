// How ops register, and what their caller reads where torch itself fails within one.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Torch's words for this thread's last failure. Its stable ABI has them from torch 2.13 on; the library is built for an
// older one, and the address is null where the process has no such function. (dlsym would need glibc 2.34.)
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace darkmatter {

inline std::string torch_reason() {
  if (torch_exception_get_what_without_backtrace == nullptr) {
    return "";
  }
  const std::string text = torch_exception_get_what_without_backtrace();
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
