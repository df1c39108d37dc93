/* What a window asks of the pager around it, where all memory is the template's. space_kill() is the test's. */
#pragma once
#include "pager/space.h"

void space_orphan(struct space *parent, struct space *child, struct lr_error error) {
	(void)child;
	space_kill(parent, error.step);
}

static struct backing template = {.page = LR_PAGE, .kind = LR_BACKING_TEMPLATE};

struct backing *space_backing(struct space *space, uint32_t kind) {
	(void)space, (void)kind;
	return &template;
}
