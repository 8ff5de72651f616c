// What host and device compute alike. No framework.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DM_HOST_DEVICE __host__ __device__
#else
#define DM_HOST_DEVICE
#endif

namespace darkmatter {

DM_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace darkmatter
