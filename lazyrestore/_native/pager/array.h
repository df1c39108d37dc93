/* Arrays that grow: a pointer, a number of elements, and a capacity. */
#pragma once
#include <stdint.h>
#include <stdlib.h>

/* The array with room for one element more than `n`, perhaps at another place; NULL, and nothing changed: no memory. */
static inline void *array_room(void *array, uint32_t n, uint32_t *capacity, size_t element) {
	enum { FIRST = 16 };
	if (n < *capacity)
		return array;
	uint32_t larger = *capacity ? *capacity * 2 : FIRST;
	void *grown = realloc(array, larger * element);
	if (grown)
		*capacity = larger;
	return grown;
}
