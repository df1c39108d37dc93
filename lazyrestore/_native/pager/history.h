/* In which order the calls of a window were made.
 *
 * Facts (window.h): events are read in the order in which they were queued, not in that of the changes they tell of; growth is not told at
 * all; memory that grew shows its file where it goes on. A call changed everything before its first event was queued, and not before
 * the last event of its thread's call before it was read. What a call has put somewhere nobody else uses before it has returned.
 * A REMOVE is the exception: memory is dropped after it was read, so after all calls of which an event was read before it.
 * Consequence: an order is possible if in it each call finds what it takes (its image is known from what the kernel showed at its
 * destination), finds its destination free, unmaps something that is there, and all ends as the kernel shows it now. What is
 * missing may have grown there from what lies before it.
 * Choice: the order in which the events were read, if it is possible; else the possible one that takes the fewest inversions of it, and of
 * these the one that needs the fewest growths. Only inversions of calls that touch the range that was found wrong are tried.
 * Cost: nothing for windows of one call, or of none that moves; else some microseconds for each event, and two questions to
 * the kernel. Where no order is found within the budget, apply.c decides event by event. */
#pragma once
#include "apply.h"
#include "uffd.h"

/* Puts the events of a window that is about to close into the order in which their calls were made. `found`: there is one, and the kernel
 * could be asked; `shown`: what it shows where the events have to do, and right behind. PROBE_BUSY: another call was made
 * meanwhile, and nothing is known; PROBE_NOT_ONE: none was. `error`: 0 or ENOMEM.
 * history_find() asks now, `shown` is empty before; history_find_of() is told what the kernel showed when all of the calls were over. */
enum probe history_find(struct space *space, struct event *events, uint32_t n, struct interval_map *shown, bool *found, int *error);
void history_find_of(struct space *space, struct event *events, uint32_t n, struct interval_map *shown, bool *found, int *error);

/* After the events were applied: what has grown, and may be cut off from what it grew from, is entered into the map as zeros. 0 or ENOMEM. */
int history_record_grown(struct space *space, const struct event *events, uint32_t n, const struct interval_map *shown);
