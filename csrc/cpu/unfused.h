// Included after the system's headers, has g++ round every product before it is added to, on every
// instruction set: the results of a file are then the same on all machines, to the last bit.
#pragma once

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
