/*
 * A small KVM virtual machine monitor: one vCPU, a Linux bzImage by the 32-bit
 * boot protocol, the in-kernel interrupt controllers and timer, a 16550 at
 * 0x3f8 whose output goes to stdout, and port 0xE9, whose output goes to a file.
 *
 *   vmm name=vm1 kernel=PATH initrd=PATH cmdline=TEXT low=MIB high=MIB [gig=1] [report=PATH]
 *
 * Memory slots: 0-640K and 1M-low from one mapping that may use huge pages;
 * 4G-(4G + high) from a mapping of 4K pages that is not aligned to 2M, or with
 * gig=1 one 1G page of hugetlbfs.
 *
 * SIGUSR1 stops the vCPU and prints its registers, SIGUSR2 lets it go on.
 */
#define _GNU_SOURCE
#include <asm/bootparam.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB (1ul << 20)
#define GIB (1ul << 30)
#define FOUR_GIB (4 * GIB)
#define MAP_HUGE_1GB_FLAG (30 << 26)

static const char *name = "vm";

static void die(const char *what)
{
    printf("%s: FATAL %s: %s\n", name, what, strerror(errno));
    fflush(stdout);
    exit(1);
}

#define TRY(call) ({ long r_ = (long)(call); if (r_ < 0) die(#call); r_; })

/* ---- memory slots */

struct slot {
    uint64_t gpa, size;
    uint8_t *hva;
    const char *what;
};
static struct slot slots[4];
static int slot_count, vm;

static void add_slot(uint64_t gpa, uint64_t size, uint8_t *hva, const char *what)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot_count, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uint64_t)hva};
    TRY(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
    slots[slot_count++] = (struct slot){gpa, size, hva, what};
}

static uint8_t *at(uint64_t gpa)
{
    for (int i = 0; i < slot_count; i++)
        if (gpa >= slots[i].gpa && gpa < slots[i].gpa + slots[i].size)
            return slots[i].hva + (gpa - slots[i].gpa);
    errno = EFAULT;
    die("guest-physical address");
    return NULL;
}

static uint8_t *map(size_t size, int flags)
{
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    return memory;
}

static uint8_t *map_aligned(size_t size, size_t offset, int advice)
{
    uintptr_t memory = (uintptr_t)map(size + 4 * MIB, MAP_NORESERVE);
    uint8_t *aligned = (uint8_t *)((memory + 2 * MIB - 1) & ~(2 * MIB - 1)) + offset;
    madvise(aligned, size, advice);
    return aligned;
}

/* ---- the serial port: enough of a 16550 for Linux' driver to print */

static struct {
    uint8_t ier, lcr, mcr, scratch, fcr, divisor_low, divisor_high, transmit_pending;
} uart = {.divisor_low = 1};

static void uart_interrupt(void)
{
    static int level = -1;
    int now = uart.transmit_pending && uart.ier & 2;
    struct kvm_irq_level line = {.irq = 4, .level = now};
    if (now != level)
        TRY(ioctl(vm, KVM_IRQ_LINE, &line));
    level = now;
}

static void uart_write(unsigned reg, uint8_t value)
{
    switch (reg) {
    case 0:
        if (uart.lcr & 0x80) {
            uart.divisor_low = value;
        } else if (!(uart.mcr & 0x10)) {
            if (value != '\r')
                putchar(value);
            if (value == '\n')
                fflush(stdout);
            uart.transmit_pending = 1;
        }
        break;
    case 1:
        if (uart.lcr & 0x80) {
            uart.divisor_high = value;
        } else {
            if (value & 2 && !(uart.ier & 2))
                uart.transmit_pending = 1;
            uart.ier = value;
        }
        break;
    case 2: uart.fcr = value; break;
    case 3: uart.lcr = value; break;
    case 4: uart.mcr = value; break;
    case 7: uart.scratch = value; break;
    }
    uart_interrupt();
}

static uint8_t uart_read(unsigned reg)
{
    uint8_t fifo = uart.fcr & 1 ? 0xc0 : 0, mcr = uart.mcr;
    switch (reg) {
    case 0: return uart.lcr & 0x80 ? uart.divisor_low : 0;
    case 1: return uart.lcr & 0x80 ? uart.divisor_high : uart.ier;
    case 2:
        if (!(uart.transmit_pending && uart.ier & 2))
            return fifo | 1;
        uart.transmit_pending = 0;
        uart_interrupt();
        return fifo | 2;
    case 3: return uart.lcr;
    case 4: return mcr;
    case 5: return 0x60;
    case 6: return mcr & 0x10 ? (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4 : 0xb0;
    case 7: return uart.scratch;
    }
    return 0xff;
}

/* ---- starting Linux */

static uint8_t *load(const char *path, size_t *size)
{
    struct stat status;
    int file = TRY(open(path, O_RDONLY));
    TRY(fstat(file, &status));
    *size = status.st_size;
    uint8_t *data = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED)
        die(path);
    close(file);
    return data;
}

static void load_linux(const char *kernel, const char *initrd, const char *cmdline, uint64_t low, uint64_t high)
{
    size_t kernel_size, initrd_size;
    uint8_t *image = load(kernel, &kernel_size), *ramdisk = load(initrd, &initrd_size);
    struct boot_params *params = (void *)at(0x10000);
    memset(params, 0, sizeof *params);
    memcpy(&params->hdr, image + 0x1f1, sizeof params->hdr);
    size_t setup = ((params->hdr.setup_sects ? params->hdr.setup_sects : 4) + 1) * 512;
    uint64_t initrd_gpa = (low - initrd_size) & ~0xffful;
    memcpy(at(0x100000), image + setup, kernel_size - setup);
    memcpy(at(initrd_gpa), ramdisk, initrd_size);
    strcpy((char *)at(0x20000), cmdline);
    params->hdr.type_of_loader = 0xff;
    params->hdr.loadflags |= LOADED_HIGH | CAN_USE_HEAP;
    params->hdr.heap_end_ptr = 0xfe00;
    params->hdr.cmd_line_ptr = 0x20000;
    params->hdr.ramdisk_image = initrd_gpa;
    params->hdr.ramdisk_size = initrd_size;
    params->hdr.vid_mode = 0xffff;
    int n = 0;
    params->e820_table[n++] = (struct boot_e820_entry){0, 0x9fc00, 1};
    params->e820_table[n++] = (struct boot_e820_entry){0x9fc00, 0x400, 2};
    params->e820_table[n++] = (struct boot_e820_entry){MIB, low - MIB, 1};
    if (high)
        params->e820_table[n++] = (struct boot_e820_entry){FOUR_GIB, high, 1};
    params->e820_entries = n;
    /* the kernel expects flat segments 0x10 and 0x18 in the GDT it is entered with */
    uint64_t *gdt = (void *)at(0x1000);
    gdt[2] = 0x00cf9b000000ffff;
    gdt[3] = 0x00cf93000000ffff;
    munmap(image, kernel_size);
    munmap(ramdisk, initrd_size);
}

/* ---- running */

static volatile sig_atomic_t stop;

static void on_signal(int signal)
{
    stop = signal == SIGUSR1;
}

static void port_io(struct kvm_run *run, int report)
{
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    unsigned port = run->io.port, size = run->io.size;
    int is_out = run->io.direction == KVM_EXIT_IO_OUT;
    if (port == 0xe9 && is_out) {
        if (report >= 0)
            TRY(write(report, data, (size_t)size * run->io.count));
        return;
    }
    for (unsigned i = 0; i < run->io.count; i++, data += size) {
        if (port >= 0x3f8 && port < 0x400 && size == 1) {
            if (is_out)
                uart_write(port - 0x3f8, *data);
            else
                *data = uart_read(port - 0x3f8);
        } else if (!is_out) {
            memset(data, 0xff, size);
        }
    }
}

static void print_state(int vcpu)
{
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    TRY(ioctl(vcpu, KVM_GET_REGS, &regs));
    TRY(ioctl(vcpu, KVM_GET_SREGS, &sregs));
    printf("\n%s: vcpu 0 rip=0x%llx rsp=0x%llx rflags=0x%llx cr0=0x%llx cr2=0x%llx cr3=0x%llx cr4=0x%llx efer=0x%llx "
           "gdt_base=0x%llx idt_base=0x%llx gs_base=0x%llx fs_base=0x%llx\n",
           name, regs.rip, regs.rsp, regs.rflags, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer,
           sregs.gdt.base, sregs.idt.base, sregs.gs.base, sregs.fs.base);
    for (int i = 0; i < slot_count; i++)
        printf("%s: memslot %d gpa=0x%lx size=0x%lx hva=0x%lx %s\n", name, i, slots[i].gpa, slots[i].size,
               (uint64_t)slots[i].hva, slots[i].what);
    printf("%s: STOPPED\n", name);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    const char *kernel = "/guest/vmlinuz", *initrd = "/guest/initrd.gz", *cmdline = "console=ttyS0";
    uint64_t low = 80 * MIB, high = 0;
    int gig = 0, report = -1;
    for (int i = 1; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        size_t length = value ? (size_t)(value++ - argv[i]) : 0;
#define IS(key) (length == strlen(key) && !strncmp(argv[i], key, length))
        if (IS("name")) name = value;
        else if (IS("kernel")) kernel = value;
        else if (IS("initrd")) initrd = value;
        else if (IS("cmdline")) cmdline = value;
        else if (IS("low")) low = atol(value) * MIB;
        else if (IS("high")) high = atol(value) * MIB;
        else if (IS("gig")) gig = atoi(value);
        else if (IS("report")) report = TRY(open(value, O_WRONLY | O_CREAT | O_TRUNC, 0600));
        else die(argv[i]);
    }
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGUSR2, &action, NULL);

    int kvm = TRY(open("/dev/kvm", O_RDWR | O_CLOEXEC));
    uint64_t identity_map = 0xfffbc000;
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    vm = TRY(ioctl(kvm, KVM_CREATE_VM, 0));
    TRY(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul));
    TRY(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map));
    TRY(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
    TRY(ioctl(vm, KVM_CREATE_PIT2, &pit));

    uint8_t *memory = map_aligned(low, 0, MADV_HUGEPAGE);
    add_slot(0, 0xa0000, memory, "low-640K");
    add_slot(MIB, low - MIB, memory + MIB, "below-4G");
    if (gig) {
        high = GIB;
        add_slot(FOUR_GIB, high, map(high, MAP_HUGETLB | MAP_HUGE_1GB_FLAG), "above-4G-1G-hugetlb");
    } else if (high) {
        add_slot(FOUR_GIB, high, map_aligned(high, 0x3000, MADV_NOHUGEPAGE), "above-4G-4K-pages");
    }
    load_linux(kernel, initrd, cmdline, low, high);

    int vcpu = TRY(ioctl(vm, KVM_CREATE_VCPU, 0));
    size_t run_size = TRY(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[100];
    } cpuid = {.head.nent = 100};
    TRY(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
    for (unsigned i = 0; i < cpuid.head.nent; i++)
        if (cpuid.entries[i].function == 1) {
            cpuid.entries[i].ebx &= 0xffffff; /* APIC id 0 */
            cpuid.entries[i].ecx |= 1u << 31; /* "a hypervisor is present" */
        }
    TRY(ioctl(vcpu, KVM_SET_CPUID2, &cpuid));

    struct kvm_sregs sregs;
    TRY(ioctl(vcpu, KVM_GET_SREGS, &sregs));
    struct kvm_segment code = {
        .limit = 0xffffffff, .selector = 0x10, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1};
    struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 |= 1;
    sregs.gdt.base = 0x1000;
    sregs.gdt.limit = 31;
    TRY(ioctl(vcpu, KVM_SET_SREGS, &sregs));
    struct kvm_regs regs = {.rip = 0x100000, .rsi = 0x10000, .rsp = 0x9000, .rflags = 2};
    TRY(ioctl(vcpu, KVM_SET_REGS, &regs));

    for (;;) {
        if (stop) {
            print_state(vcpu);
            while (stop)
                usleep(10000);
            printf("%s: RESUMED\n", name);
            fflush(stdout);
        }
        if (ioctl(vcpu, KVM_RUN, 0) < 0) {
            if (errno != EINTR && errno != EAGAIN)
                die("KVM_RUN");
            continue;
        }
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            port_io(run, report);
            break;
        case KVM_EXIT_MMIO:
            if (!run->mmio.is_write)
                memset(run->mmio.data, 0xff, 8);
            break;
        default:
            printf("%s: FATAL exit %u, suberror %u\n", name, run->exit_reason, run->internal.suberror);
            fflush(stdout);
            return 1;
        }
    }
}
