/* What a restorer and the pager say to each other: memory layouts, little endian, the sender's own architecture.
 *
 * Python reads this text too (cffi's cdef, without the lines that begin with '#'): only fixed-width types, no macros.
 * Every request is one SOCK_SEQPACKET packet of struct lr_request; its descriptors travel in the same packet. */
#pragma once
#include <stdint.h>

enum {
	LR_PROTOCOL_VERSION = 6,
	LR_IMAGE_MAGIC = 0x474d494c,
	LR_IMAGE_HUGETLB = 1, /* lr_image.flags: there are hugetlb VMAs */
	LR_IMAGE_SUMS = 2,    /* lr_image.flags: a uint32_t for each block of the index follows it: CRC-32 of its entries */
	LR_INDEX_BLOCK = 128, /* entries; the last block may have fewer */
	LR_MAX_SHARED = 248,  /* the kernel passes 253 descriptors in one packet; three are taken */
	LR_MAX_CHUNK = 2097152
};

/* lr_request.kind */
enum {
	LR_HELLO = 1,  /* reply: lr_reply with [template memfd, hugetlb template memfd if the image has one] */
	LR_ATTACH = 2, /* fds: userfaultfd, pidfd, memfd of lr_range[n_ranges], n_shared memfds; reply: lr_reply */
	LR_STATS = 3,  /* reply: lr_totals, then n_spaces packets of lr_space_stats */
	LR_STOP = 4,   /* exit when no address space is left, without lingering; reply: lr_reply */
	LR_WORKING_SET = 5, /* reply: lr_reply with [memfd of lr_touched[], in the order of first touch] */
	LR_INTERVALS = 6 /* fds: pidfd of a process that stands still, whose memory is about to be read: its recording
			  * ends; reply: lr_reply with [memfd of lr_range[]] */
};

/* lr_request.flags of LR_ATTACH */
enum {
	LR_ATTACH_EAGER = 1, /* fill the given shared backings wholly before the reply: read(2) on a memfd never faults */
	LR_ATTACH_NO_RECORD = 2, /* do not record a working set */
	LR_ATTACH_RECORD_AGAIN = 8, /* record even if one is known, and add to it */
	LR_ATTACH_NO_REPLAY = 4, /* do not bring the working set */
	LR_ATTACH_FILL_IDLE = 16, /* bring all private memory when the CPUs have nothing else to do */
	LR_ATTACH_FILL_NOW = 32,  /* bring all private memory at once */
	LR_ATTACH_OWN_PAGES = 64  /* the process has its own copies of the pages that the working set calls written */
};

/* lr_request.flags of LR_WORKING_SET */
enum {
	LR_WORKING_SET_END = 1,   /* end the recording now */
	LR_WORKING_SET_FILLED = 2 /* fill its chunks first, and leave out those that cannot be; nothing while it is recorded */
};

/* lr_range.backing */
enum {
	LR_BACKING_TEMPLATE = 0,
	LR_BACKING_HUGETLB = 1,
	LR_BACKING_SHARED = 2 /* 2 + k: shared object k */
};

/* lr_range.flags in the reply to LR_INTERVALS. There, what lies in no range is zero if it is private (a mapping grew), and
 * unknown if it is shared: of shared memory only what nobody has touched is told. A private page that the process wrote is
 * its own, whatever is told of its address. */
enum {
	LR_RANGE_ZERO = 1 /* reads zero; `image` means nothing */
};

/* The image memfd: this header, then n_packs times lr_pack, then n_working_set times
 * struct lr_touched, then n_frames times struct lr_frame. */
struct lr_image {
	uint32_t magic;
	uint32_t version;
	uint32_t flags;
	uint32_t n_packs;
	uint64_t index_offset; /* bytes into the data file; lr_chunk[n_chunks], then the checksums, if there are any */
	uint64_t n_chunks;
	uint32_t n_working_set;
	uint32_t n_frames;
	uint64_t frames_offset; /* bytes into the data file: of the working set's pack; its frames follow one another */
	char name[96]; /* the snapshot's, for log lines; ends with a zero byte */
};

struct lr_pack {
	uint64_t offset; /* bytes into the data file */
	uint64_t length; /* bytes */
};

struct lr_chunk {
	uint64_t address; /* image address, multiple of 4096; sorted, not overlapping */
	uint32_t length;  /* raw bytes, 4096 to 2 MiB, multiple of 4096 */
	uint32_t pack;    /* slot in the list of packs */
	uint32_t offset;  /* bytes into the pack */
	uint32_t stored;  /* compressed bytes: see stored.h */
};

/* One chunk of the working set. Bits stand for its first 16 pages; chunks of private memory have no more. */
struct lr_touched {
	uint32_t chunk;   /* position in the chunk index */
	uint16_t written; /* bit i: the process wrote page i of it */
	uint16_t pages;   /* bit i: it touched page i of it; 0: all of them */
};

/* One zstd frame, with content size and checksum, of the working set's pack: the raw bytes of the touched pages of chunks that follow
 * one another in the working set, those of the first frame first. */
struct lr_frame {
	uint32_t stored; /* compressed bytes */
	uint32_t chunks; /* at least 1; together 2 MiB raw at most */
	uint32_t tag;    /* CRC-32 of the chunks' numbers, each as a uint32_t, with its pages, a uint16_t, behind it unless they
			  * are 0, and of the frame's last 4 bytes, its checksum */
};

/* One restored VMA, or part of one. Sorted by start, not overlapping. */
struct lr_range {
	uint64_t start; /* virtual address */
	uint64_t end;   /* exclusive */
	uint64_t image; /* image address of start */
	uint32_t backing;
	uint32_t flags; /* 0 in LR_ATTACH */
};

struct lr_request {
	uint32_t kind;
	uint32_t version;
	uint32_t flags;
	uint32_t n_ranges;
	uint32_t n_shared;
	uint32_t shared[248]; /* the shared object's number k of each shared memfd, in the descriptors' order */
};

struct lr_reply {
	uint32_t kind;
	int32_t error;    /* errno; 0: done */
	uint64_t address; /* what the failed step was about: a virtual or image address, or 0 */
	char step[64];    /* the system call or check that failed */
	int32_t pager;    /* pid */
	int32_t keeper;   /* pid */
	uint32_t n_fds;   /* descriptors in this packet */
	uint32_t n_spaces;
};

/* Indices into counters[]; each is a count since the pager, or the address space, began. */
enum {
	LR_COUNT_MISSING = 0,    /* faults of kind MISSING */
	LR_COUNT_MINOR = 1,      /* faults of kind MINOR */
	LR_COUNT_WRITE = 2,      /* of these two: by a write */
	LR_COUNT_ZERO = 3,       /* of these: answered with zeros */
	LR_COUNT_ZERO_PAGES = 4, /* pages (4 KiB) of zeros installed */
	LR_COUNT_PAGES = 5,      /* pages (4 KiB) of the image installed */
	LR_COUNT_FORK = 6,
	LR_COUNT_REMAP = 7,
	LR_COUNT_REMOVE = 8,
	LR_COUNT_UNMAP = 9,
	LR_COUNT_EAGAIN = 10, /* installs put off because an event was under way */
	LR_COUNT_EEXIST = 11, /* pages that somebody had installed before */
	LR_COUNT_GONE = 12,   /* faults whose range was gone when they were served */
	LR_COUNT_POISON = 13, /* faults answered with SIGBUS: a damaged chunk */
	LR_COUNT_REPLAYED = 14, /* pages (4 KiB) of the working set installed before they were touched */
	LR_N_COUNTERS = 15
};

struct lr_totals {
	uint32_t kind;
	int32_t error;
	uint32_t n_spaces;      /* alive, and packets of lr_space_stats that follow */
	uint32_t spaces_ended;
	uint64_t uptime_ns;
	uint64_t chunks_total;  /* in the snapshot's index */
	uint64_t chunks_filled; /* decompressed; one chunk counts once per backing */
	uint64_t chunks_bad;
	uint64_t bytes_filled;  /* raw bytes decompressed */
	uint64_t bytes_read;    /* compressed bytes read */
	uint64_t faults;        /* samples behind the service times */
	uint64_t service_p50_ns; /* from the read of the fault message to the wake of its thread */
	uint64_t service_p99_ns;
	uint64_t service_max_ns;
	uint64_t counters[15];
};

struct lr_space_stats {
	int32_t pid;         /* in the pager's PID namespace; 0: a forked child that is not known (yet) */
	uint32_t generation; /* 0: restored; 1: its child; and so on */
	uint64_t id;         /* counts up over the pager's life */
	uint64_t intervals;
	uint64_t bytes_registered; /* at ATTACH; a forked child: its parent's */
	uint64_t service_p50_ns;
	uint64_t service_p99_ns;
	uint64_t service_max_ns;
	uint64_t counters[15];
};
