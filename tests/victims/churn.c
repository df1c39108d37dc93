/* Threads that make threads that end at once, for ever. */
#include <limits.h>
#include <pthread.h>
#include <unistd.h>

static void *end(void *unused) { return unused; }

static void *make(void *unused)
{
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, PTHREAD_STACK_MIN);
	for (;;)
		if (pthread_create(&thread, &attributes, end, unused))
			usleep(100);
	return unused;
}

int main(void)
{
	pthread_t thread;

	for (int i = 0; i < 3; i++)
		if (pthread_create(&thread, NULL, make, NULL))
			return 65;
	pause();
}
