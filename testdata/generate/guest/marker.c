/*
 * A process that is easy to find again: fills 16 pages with its argument and a
 * running number, then sleeps (or, with a second argument "spin", never does).
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    const size_t size = 16 * 4096;
    const char *text = argc > 1 ? argv[1] : "NO-MARKER";
    char *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t at = 0; at < size; at += 64)
        snprintf(pages + at, 64, "%s#%05zu", text, at / 64);
    printf("%s: pid %d, \"%s\" at %p\n", argv[0], getpid(), text, (void *)pages);
    fflush(stdout);
    if (argc > 2 && !strcmp(argv[2], "spin"))
        for (volatile unsigned long count = 0;; count++)
            pages[4095] = (char)count;
    for (;;)
        pause();
}
