/*
 * The innermost virtual machine of a nested capture: a monitor with one vCPU
 * and 8 MiB of guest memory, whose guest runs in long mode on page tables of
 * its own.
 *
 * Guest-physical layout:
 *   0x1000 PML4, 0x2000 PDPT and 0x3000 PD of the identity map (4 * 2M)
 *   0x10000 PDPT, 0x11000 PD, 0x12000 PT of the second map: the 16 pages from
 *           virtual 0xffff800000000000 on are 0x10f000, 0x10e000 ... 0x100000,
 *           so virtual and physical order differ
 *   0x5000 the 32 bytes of the marker, 0x6000 a counter, 0x8000 code
 *   0x100000-0x10ffff the marker, written by the guest through the second map;
 *           the first 8 bytes of each page are then its virtual address
 *
 * SIGUSR1 stops the guest for good. Prints "inner: READY", then "inner: STOPPED".
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (8u << 20)
#define TRY(call) ({ long r_ = (long)(call); if (r_ < 0) { perror(#call); exit(1); } r_; })

static volatile sig_atomic_t stop;

static void on_stop(int signal)
{
    (void)signal;
    stop = 1;
}

static const uint8_t code[] = {
    0x48, 0xbf, 0, 0, 0, 0, 0, 0x80, 0xff, 0xff, /* mov rdi, 0xffff800000000000 */
    0xba, 0x10, 0, 0, 0,                         /* mov edx, 16                 */
    0x49, 0x89, 0xf8,                            /* 1: mov r8, rdi              */
    0xbb, 0x80, 0, 0, 0,                         /* mov ebx, 128                */
    0xbe, 0x00, 0x50, 0, 0,                      /* 2: mov esi, 0x5000          */
    0xb9, 0x04, 0, 0, 0,                         /* mov ecx, 4                  */
    0xf3, 0x48, 0xa5,                            /* rep movsq                   */
    0xff, 0xcb,                                  /* dec ebx                     */
    0x75, 0xef,                                  /* jnz 2b                      */
    0x4d, 0x89, 0x00,                            /* mov [r8], r8                */
    0xff, 0xca,                                  /* dec edx                     */
    0x75, 0xe0,                                  /* jnz 1b                      */
    0xb0, 0x4b, 0xe6, 0x80,                      /* mov al, 'K'; out 0x80, al   */
    0x48, 0xff, 0x04, 0x25, 0, 0x60, 0, 0,       /* 3: inc qword [0x6000]       */
    0xf4,                                        /* hlt                         */
    0xeb, 0xf5,                                  /* jmp 3b                      */
};

static void put(uint8_t *memory, unsigned at, uint64_t value)
{
    memcpy(memory + at, &value, 8);
}

int main(void)
{
    struct sigaction action = {.sa_handler = on_stop};
    sigaction(SIGUSR1, &action, NULL);
    int kvm = TRY(open("/dev/kvm", O_RDWR | O_CLOEXEC));
    int vm = TRY(ioctl(kvm, KVM_CREATE_VM, 0));
    uint8_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {.memory_size = SIZE, .userspace_addr = (uintptr_t)memory};
    TRY(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul));
    TRY(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
    int vcpu = TRY(ioctl(vm, KVM_CREATE_VCPU, 0));
    size_t run_size = TRY(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[100];
    } cpuid = {.head.nent = 100};
    TRY(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
    TRY(ioctl(vcpu, KVM_SET_CPUID2, &cpuid));

    put(memory, 0x1000, 0x2003);
    put(memory, 0x2000, 0x3003);
    for (unsigned i = 0; i < 4; i++)
        put(memory, 0x3000 + 8 * i, (uint64_t)i << 21 | 0x83);
    put(memory, 0x1000 + 8 * 256, 0x10003);
    put(memory, 0x10000, 0x11003);
    put(memory, 0x11000, 0x12003);
    for (unsigned i = 0; i < 16; i++)
        put(memory, 0x12000 + 8 * i, (0x10f000 - 0x1000 * i) | 3);
    memcpy(memory + 0x5000, "INNER-GUEST-MARKER-WRITTEN-BY-IT", 32);
    memcpy(memory + 0x8000, code, sizeof code);

    struct kvm_sregs sregs;
    TRY(ioctl(vcpu, KVM_GET_SREGS, &sregs));
    struct kvm_segment cs = {.limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment ds = {.limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    sregs.cs = cs;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = ds;
    sregs.cr0 = 0x80000031;
    sregs.cr3 = 0x1000;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    TRY(ioctl(vcpu, KVM_SET_SREGS, &sregs));
    struct kvm_regs regs = {.rip = 0x8000, .rsp = 0x7000, .rflags = 2};
    TRY(ioctl(vcpu, KVM_SET_REGS, &regs));

    unsigned long halts = 0;
    while (!stop) {
        if (ioctl(vcpu, KVM_RUN, 0) < 0)
            continue; /* a signal */
        if (run->exit_reason == KVM_EXIT_HLT) {
            if (++halts == 5)
                puts("inner: READY"), fflush(stdout);
            usleep(100000);
        } else if (run->exit_reason != KVM_EXIT_IO) {
            printf("inner: FATAL exit %u\n", run->exit_reason);
            return 1;
        }
    }
    TRY(ioctl(vcpu, KVM_GET_REGS, &regs));
    TRY(ioctl(vcpu, KVM_GET_SREGS, &sregs));
    printf("inner: memslot 0 gpa=0x0 size=%#x hva=%p ram\n", SIZE, (void *)memory);
    printf("inner: vcpu 0 rip=0x%llx rsp=0x%llx rflags=0x%llx cr0=0x%llx cr2=0x%llx cr3=0x%llx cr4=0x%llx efer=0x%llx "
           "gdt_base=0x%llx idt_base=0x%llx gs_base=0x%llx fs_base=0x%llx\n",
           regs.rip, regs.rsp, regs.rflags, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer,
           sregs.gdt.base, sregs.idt.base, sregs.gs.base, sregs.fs.base);
    puts("inner: STOPPED");
    fflush(stdout);
    for (;;)
        pause();
}
