// libstdc++'s shared pointers ask glibc 2.32 and later whether the process has one thread. This answers "no" in its
// place, so that a library built here loads with glibc 2.28, which torch's own wheels ask for (manylinux_2_28).
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
