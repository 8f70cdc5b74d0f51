// One source, several instruction sets: the library picks the widest that the machine has when it
// is loaded, so one build runs everywhere and still vectorises to AVX2 or AVX-512.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__)
#define JEPA_FAST_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JEPA_FAST_CLONES
#endif
