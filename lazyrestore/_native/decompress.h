/* For Python, where few chunks are read: what cannot be lazy, and verify. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Writes the `length` bytes of memory of which `stored` bytes at `payload` are all that is stored. NULL, or what is wrong with these: a
 * text that lasts. */
const char *lr_decompress(const void *payload, size_t stored, void *memory, size_t length);
