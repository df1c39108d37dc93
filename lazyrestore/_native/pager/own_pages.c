#define _GNU_SOURCE
#include "own_pages.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int by_chunk(const void *a, const void *b) {
	uint32_t x = ((const struct own_entry *)a)->chunk, y = ((const struct own_entry *)b)->chunk;
	return (x > y) - (x < y);
}

void own_pages_init(struct own_pages *own, const struct image *image) {
	uint32_t in_frames = 0, n = 0, pages = 0;
	if (image->n_frames)
		in_frames = image->frames[image->n_frames - 1].first + image->frames[image->n_frames - 1].n;
	struct own_entry *entries = in_frames ? calloc(in_frames, sizeof *entries) : NULL;
	if (!entries)
		return;
	for (uint32_t i = 0; i < in_frames; i++) {
		const struct lr_touched *touched = &image->working_set[i];
		uint16_t written = touched->written & touched->pages; /* what has all pages counts none of them */
		if (written)
			entries[n++] = (struct own_entry){.chunk = touched->chunk, .pages = written};
	}
	qsort(entries, n, sizeof *entries, by_chunk);
	for (uint32_t i = 0; i < n; i++) {
		entries[i].first = pages;
		pages += (uint32_t)__builtin_popcount(entries[i].pages);
		if (i && entries[i].chunk == entries[i - 1].chunk)
			n = 0; /* a chunk twice: the list is damaged */
	}
	size_t length = pages * (size_t)LR_PAGE;
	char *raw = n ? mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
	if (raw == MAP_FAILED) {
		free(entries);
		return;
	}
	*own = (struct own_pages){.entries = entries, .n = n, .raw = raw, .length = length};
}

struct own_entry *own_pages_find(const struct own_pages *own, uint32_t chunk) {
	const struct own_entry wanted = {.chunk = chunk};
	return own->n ? bsearch(&wanted, own->entries, own->n, sizeof wanted, by_chunk) : NULL;
}

void own_pages_keep(const struct own_pages *own, struct own_entry *entry, uint32_t pages, const char *raw) {
	char *to = own->raw + entry->first * (size_t)LR_PAGE;
	for (uint32_t page = 0; page < 16; page++) {
		if (!(pages >> page & 1))
			continue;
		if (entry->pages >> page & 1) {
			memcpy(to, raw, LR_PAGE);
			to += LR_PAGE;
		}
		raw += LR_PAGE;
	}
	atomic_store_explicit(&entry->there, true, memory_order_release);
}

const char *own_pages_bytes(const struct own_pages *own, const struct own_entry *entry, uint32_t page) {
	if (!entry || page >= 16 || !(entry->pages >> page & 1) || !atomic_load_explicit(&entry->there, memory_order_acquire))
		return NULL;
	uint32_t before = (uint32_t)__builtin_popcount(entry->pages & ((1u << page) - 1));
	return own->raw + (entry->first + before) * (size_t)LR_PAGE;
}
