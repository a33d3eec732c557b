/*
 * Hands records to the world outside the machine, through port 0xE9 or the one
 * that the environment variable REPORT_PORT names.
 *
 *   report file NAME PATH
 *       the contents of a file
 *   report pages NAME PID GPA:SIZE:HVA...
 *       the guest pages that a virtual machine monitor holds: for each page of
 *       the given ranges that is present in process PID, a line with its
 *       guest-physical address, the frame it has in /proc/PID/pagemap and the
 *       SHA-256 of what PID sees there (/proc/PID/mem).
 *
 * Only the monitor's own page tables are consulted, never EPT or NPT, and only
 * pages that are present are read, so that reading brings none in.
 *
 * A record is "@@REPORT kind name size\n", size bytes, "\n".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <unistd.h>

#define PAGE 4096u
#define PRESENT (1ull << 63)
#define FRAME ((1ull << 55) - 1)

static void die(const char *what)
{
    fprintf(stderr, "report: FATAL %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint16_t port = 0xe9;

static void out(const void *data, size_t size)
{
    __asm__ volatile("cld; rep outsb" : "+S"(data), "+c"(size) : "d"(port) : "memory");
}

static void record(const char *kind, const char *name, const void *data, size_t size)
{
    char header[256];
    out(header, snprintf(header, sizeof header, "\n@@REPORT %s %s %zu\n", kind, name, size));
    out(data, size);
    out("\n", 1);
}

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t word, int count)
{
    return word >> count | word << (32 - count);
}

static void sha256_block(uint32_t state[8], const uint8_t block[64])
{
    uint32_t w[64];
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 16; i++) {
        memcpy(&w[i], block + 4 * i, 4);
        w[i] = __builtin_bswap32(w[i]);
    }
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + K[i] + w[i];
        uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1;
        d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static void sha256_page(const uint8_t page[PAGE], char hex[65])
{
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t last[64] = {0x80, [62] = PAGE * 8 >> 8, [63] = (uint8_t)(PAGE * 8)};
    for (unsigned i = 0; i < PAGE; i += 64)
        sha256_block(state, page + i);
    sha256_block(state, last);
    for (int i = 0; i < 8; i++)
        sprintf(hex + 8 * i, "%08x", state[i]);
}

static void report_file(const char *name, const char *path)
{
    int file = open(path, O_RDONLY);
    size_t size = 0, room = 1 << 20;
    char *data = malloc(room);
    ssize_t got;
    if (file < 0 || !data)
        die(path);
    while ((got = read(file, data + size, room - size)) > 0) {
        size += got;
        if (size == room && !(data = realloc(data, room *= 2)))
            die("memory");
    }
    record("file", name, data, size);
}

static void report_pages(const char *name, const char *pid, char **ranges)
{
    static const uint8_t zero[PAGE];
    static uint8_t page[PAGE];
    char path[64], hex[65], zero_hex[65], *text;
    size_t size;
    unsigned long present = 0, absent = 0;
    snprintf(path, sizeof path, "/proc/%s/pagemap", pid);
    int pagemap = open(path, O_RDONLY);
    snprintf(path, sizeof path, "/proc/%s/mem", pid);
    int mem = open(path, O_RDONLY);
    FILE *lines = open_memstream(&text, &size);
    if (pagemap < 0 || mem < 0 || !lines)
        die(path);
    sha256_page(zero, zero_hex);
    for (; *ranges; ranges++) {
        unsigned long gpa, length, hva;
        if (sscanf(*ranges, "%lx:%lx:%lx", &gpa, &length, &hva) != 3)
            die(*ranges);
        for (unsigned long at = 0; at < length; at += PAGE) {
            uint64_t entry;
            if (pread(pagemap, &entry, 8, (hva + at) / PAGE * 8) != 8)
                die("pagemap");
            if (!(entry & PRESENT)) {
                absent++;
                continue;
            }
            if (pread(mem, page, PAGE, hva + at) != PAGE)
                die("mem");
            present++;
            int is_zero = !memcmp(page, zero, PAGE);
            if (!is_zero)
                sha256_page(page, hex);
            fprintf(lines, "%#lx %#lx %s\n", gpa + at, (unsigned long)(entry & FRAME), is_zero ? zero_hex : hex);
        }
    }
    fprintf(lines, "# present %lu absent %lu\n", present, absent);
    fclose(lines);
    record("pages", name, text, size);
}

int main(int argc, char **argv)
{
    const char *other = getenv("REPORT_PORT");
    if (other && *other)
        port = strtoul(other, NULL, 0);
    if (iopl(3) < 0)
        die("iopl");
    if (argc == 4 && !strcmp(argv[1], "file"))
        report_file(argv[2], argv[3]);
    else if (argc > 4 && !strcmp(argv[1], "pages"))
        report_pages(argv[2], argv[3], argv + 4);
    else
        die("usage: report file NAME PATH | report pages NAME PID GPA:SIZE:HVA...");
    return 0;
}
