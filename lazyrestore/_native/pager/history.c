#include "history.h"

#include "pieces.h"
#include "scene.h"
#include "space.h"
#include <string.h>

enum { MAX_EVENTS = 400, MAX_INVERSIONS = 5, BUDGET = 20000 /* some 5 ms */ };

static bool overlap(struct range a, struct range b) {
	return a.start < b.end && b.start < a.end;
}

static bool touches(const struct event *event, struct range range) {
	return overlap((struct range){event->start, event->end}, range) || overlap(destination(event), range);
}

/* -- what is known of the order ---------------------------------------------------------------------------------------- */

/* Does an UNMAP belong to the same call as a REMAP: of the target, or of the end that is cut off? */
static bool is_of(const struct event *unmap, const struct event *move) {
	uint64_t length = move->end - move->start;
	if (unmap->kind != UFFD_EVENT_UNMAP || !is_move(move))
		return false;
	if (unmap->number > move->number)
		return unmap->number < move->done && unmap->start == move->end && !differ(unmap->by, move->by);
	return unmap->start == move->to && unmap->end >= move->to + length && same(unmap->by, move->by);
}

static void find_calls(struct history *history) {
	for (uint32_t i = 0; i < history->n; i++) {
		history->host[i] = i;
		history->begun[i] = history->events[i].number;
	}
	for (uint32_t i = 0; i < history->n; i++)
		for (uint32_t k = i + 1; is_move(&history->events[i]) && k < history->n; k++)
			if (is_of(&history->events[k], &history->events[i])) {
				history->host[k] = i;
				history->begun[k] = history->begun[i];
				break;
			}
	for (uint32_t i = 0; i < history->n; i++)
		for (uint32_t k = i; is_move(&history->events[i]) && k--;) {
			if (!same(history->events[k].by, history->events[i].by))
				continue;
			if (history->host[k] == k && is_of(&history->events[k], &history->events[i])) {
				history->host[k] = i;
				history->begun[i] = history->begun[k];
			}
			break;
		}
	for (uint32_t i = 0; i < history->n; i++) {
		history->low[i] = 0;
		for (uint32_t k = 0; k < history->n; k++) {
			const struct event *before = &history->events[k];
			if (same(before->by, history->events[i].by) && before->done < history->begun[i] && before->done > history->low[i])
				history->low[i] = before->done;
		}
	}
}

/* Was the call of event `a`, which was read first, surely made before that of `b`? */
static bool must_precede(const struct history *history, uint32_t a, uint32_t b) {
	const struct event *first = &history->events[a], *second = &history->events[b];
	if (history->begun[a] >= history->begun[b])
		return false;
	return second->kind == UFFD_EVENT_REMOVE || same(first->by, second->by) || history->begun[a] <= history->low[b];
}

/* -- the search -------------------------------------------------------------------------------------------------------- */

/* Moves the event at `from` to the place before that at `to`, with those between that must be before it. False: not possible. */
static bool invert(const struct history *history, uint32_t *order, uint32_t to, uint32_t from) {
	uint32_t early[MAX_EVENTS], late[MAX_EVENTS];
	uint32_t n_early = 0, n_late = 0;
	early[n_early++] = order[from];
	for (uint32_t i = from; i-- > to;) {
		bool goes_along = false;
		for (uint32_t k = 0; k < n_early && !goes_along; k++)
			goes_along = must_precede(history, order[i], early[k]);
		if (goes_along)
			early[n_early++] = order[i];
		else
			late[n_late++] = order[i];
	}
	if (!n_late || late[n_late - 1] != order[to])
		return false;
	while (n_early)
		order[to++] = early[--n_early];
	while (n_late)
		order[to++] = late[--n_late];
	return true;
}

struct best {
	bool found;
	uint32_t cost;
	uint32_t order[MAX_EVENTS];
};

static bool meet(const struct event *a, const struct event *b) {
	return touches(a, (struct range){b->start, b->end}) || (is_move(b) && touches(a, destination(b)));
}

/* Tries all orders that `more` inversions make of `order`, whose replay ended so; they cost `paid` before. 0 or ENOMEM. */
static int search(struct history *history, const uint32_t *order, const struct outcome *ended, unsigned more, uint32_t paid,
		  struct best *best) {
	uint32_t tried[MAX_EVENTS];
	uint32_t last = ended->position < history->n_calls ? ended->position : history->n_calls - 1;
	for (uint32_t i = last + 1; i-- > 0;) {
		const struct event *first = &history->events[order[i]];
		for (uint32_t k = i + 1; k < history->n_calls && history->budget; k++) {
			const struct event *second = &history->events[order[k]];
			if (second->kind == UFFD_EVENT_FORK || !meet(first, second))
				continue;
			memcpy(tried, order, history->n_calls * sizeof *order);
			if (!invert(history, tried, i, k))
				continue;
			struct outcome outcome = scene_replay(history, tried);
			outcome.cost += paid + INVERSION;
			if (!outcome.error && outcome.possible && (!best->found || outcome.cost < best->cost)) {
				best->found = true;
				best->cost = outcome.cost;
				memcpy(best->order, tried, history->n_calls * sizeof *tried);
			}
			if (!outcome.error && more > 1)
				outcome.error = search(history, tried, &outcome, more - 1, paid + INVERSION, best);
			if (outcome.error)
				return outcome.error;
		}
	}
	return 0;
}

static int find(struct history *history, struct best *best) {
	uint32_t read[MAX_EVENTS];
	for (uint32_t i = 0; i < history->n; i++)
		if (history->host[i] == i)
			read[history->n_calls++] = i;
	struct outcome outcome = scene_replay(history, read);
	memcpy(best->order, read, sizeof read);
	best->found = outcome.possible;
	best->cost = outcome.cost;
	for (unsigned n = 1; !outcome.error && history->budget && n <= MAX_INVERSIONS && (!best->found || n * INVERSION < best->cost); n++)
		outcome.error = search(history, read, &outcome, n, 0, best);
	return outcome.error;
}

static bool is_simple(const struct event *events, uint32_t n) {
	for (uint32_t i = 0; i < n; i++)
		if (is_move(&events[i]))
			return n == 1 || n > MAX_EVENTS;
	return true;
}

static void reorder(const struct history *history, struct event *events, const uint32_t *order) {
	struct event read[MAX_EVENTS];
	uint32_t n = 0;
	memcpy(read, events, history->n * sizeof *events);
	for (uint32_t i = 0; i < history->n_calls; i++) {
		for (uint32_t k = 0; k < history->n; k++)
			if (history->host[k] == order[i] && k != order[i])
				events[n++] = read[k];
		events[n++] = read[order[i]];
	}
}

void history_find_of(struct space *space, struct event *events, uint32_t n, struct interval_map *shown, bool *found, int *error) {
	uint32_t low[MAX_EVENTS], host[MAX_EVENTS], begun[MAX_EVENTS];
	struct history history = {
		.space = space, .events = events, .n = n, .truth = shown, .low = low, .host = host, .begun = begun, .budget = BUDGET};
	struct best best = {0};
	*found = false;
	*error = 0;
	if (n > MAX_EVENTS)
		return;
	interval_map_init(&history.scene);
	interval_map_init(&history.now);
	find_calls(&history);
	*error = scene_set(&history);
	if (!*error)
		*error = find(&history, &best);
	if (!*error && best.found)
		reorder(&history, events, best.order);
	*found = !*error && best.found;
	interval_map_deinit(&history.scene);
	interval_map_deinit(&history.now);
	free(history.anchors);
}

enum probe history_find(struct space *space, struct event *events, uint32_t n, struct interval_map *shown, bool *found, int *error) {
	*found = false;
	*error = 0;
	if (space->pidfd < 0 || is_simple(events, n))
		return PROBE_NOT_ONE;
	*error = scene_ask(space, events, n, shown);
	enum probe quiet = uffd_probe(space->uffd, NOWHERE, NOWHERE + LR_PAGE);
	if (!*error && quiet == PROBE_NOT_ONE)
		history_find_of(space, events, n, shown, found, error);
	return quiet;
}

/* What is mapped from `address` on, and the map does not know. */
static int record_grown(struct space *space, const struct interval_map *shown, uint64_t address) {
	struct interval piece, next;
	if (!interval_map_find(shown, address, &piece) || piece.backing >= LR_BACKING_SHARED)
		return 0;
	piece = piece_cut(piece, address, piece.end);
	if (interval_map_next(&space->map, address, &next) && next.start < piece.end)
		piece.end = next.start;
	if (piece.start >= piece.end)
		return 0;
	piece.flags = INTERVAL_ZERO;
	return interval_map_insert(&space->map, piece);
}

int history_record_grown(struct space *space, const struct event *events, uint32_t n, const struct interval_map *shown) {
	int error = 0;
	for (uint32_t i = 0; !error && i < n; i++) {
		if (maps_away(&events[i]))
			error = record_grown(space, shown, events[i].end);
		if (!error && is_move(&events[i]))
			error = record_grown(space, shown, destination(&events[i]).end);
	}
	return error;
}
