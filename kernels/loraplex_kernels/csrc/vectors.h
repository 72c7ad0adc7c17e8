/* Vectors of 16 lanes, as GCC and Clang both know them. */
#pragma once
#include <stdint.h>

#define LANES 16

typedef float vf __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t vi __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint32_t vu __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef int8_t vb __attribute__((vector_size(LANES * sizeof(int8_t))));
typedef uint16_t vh __attribute__((vector_size(LANES * sizeof(uint16_t))));

#define INLINE static inline __attribute__((always_inline))

/* Lanes of a (0 to 15) and b (16 to 31), in the order given. */
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
