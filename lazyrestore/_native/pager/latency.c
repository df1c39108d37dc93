#include "latency.h"

#include <fcntl.h>
#include <unistd.h>

static const uint64_t BUDGET_NS = 1000000000, BURST_NS = 1000000;
static const int32_t AWAKE_US = 0, WHATEVER_US = INT32_MAX; /* the kernel caps it at its default, 2e9 */

void latency_init(struct latency *latency, bool wanted) {
	*latency = (struct latency){.fd = wanted ? open("/dev/cpu_dma_latency", O_WRONLY | O_CLOEXEC) : -1};
	pthread_mutex_init(&latency->lock, NULL);
}

static void ask(struct latency *latency, int32_t us) {
	if (latency->fd >= 0 && write(latency->fd, &us, sizeof us) != sizeof us) {
		close(latency->fd); /* and go on without */
		latency->fd = -1;
	}
}

static void hold(struct latency *latency, struct latency_share *share, uint64_t now) {
	share->held = true;
	share->since_ns = now;
	pthread_mutex_lock(&latency->lock);
	if (!latency->holders++)
		ask(latency, AWAKE_US);
	pthread_mutex_unlock(&latency->lock);
}

void latency_end(struct latency *latency, struct latency_share *share, uint64_t now) {
	if (!share->held)
		return;
	share->held = false;
	share->spent_ns += now - share->since_ns;
	pthread_mutex_lock(&latency->lock);
	if (!--latency->holders)
		ask(latency, WHATEVER_US);
	pthread_mutex_unlock(&latency->lock);
}

void latency_begin(struct latency *latency, struct latency_share *share, uint64_t now) {
	if (!share->held)
		hold(latency, share, now);
	share->message_ns = now;
}

void latency_messages(struct latency *latency, struct latency_share *share, uint64_t now) {
	uint64_t pause = now - share->message_ns;
	share->message_ns = now;
	if (share->held && share->spent_ns + (now - share->since_ns) > BUDGET_NS)
		latency_end(latency, share, now);
	else if (!share->held && pause < BURST_NS && share->spent_ns < BUDGET_NS)
		hold(latency, share, now);
}
