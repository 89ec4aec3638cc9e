// The start of a machine that runs one program: 64 bits, one gigabyte of memory where it is, every register that the
// processor has. Multiboot brings it here; machine.c does the rest.

.section .boot, "ax"
.code32
header:
        .long 0x1badb002, 1 << 16, -(0x1badb002 + (1 << 16))
        .long header, header, image_end, memory_end, entry

entry:
        lgdt descriptors_at
        mov $tables, %eax
        mov %eax, %cr3
        mov $0x40620, %eax              // PAE, SSE and XSAVE
        mov %eax, %cr4
        mov $0xc0000080, %ecx           // EFER: 64 bits, syscall
        rdmsr
        or $0x101, %eax
        wrmsr
        mov $0x80000033, %eax           // paging, protection
        mov %eax, %cr0
        ljmp $8, $wide

.code64
wide:
        mov $16, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        xor %ecx, %ecx                  // every state that XSAVE knows: vectors, masks, tiles
        mov $13, %eax
        cpuid
        xor %ecx, %ecx
        xor %edx, %edx
        xsetbv
        mov $stack_end, %rsp
        call run

// The program runs in ring 0 too, so only the stack is another.
.global on_syscall
on_syscall:
        mov %rsp, program_stack
        mov $stack_end, %rsp
        push %rcx
        push %rdi
        push %rsi
        push %rdx
        push %r8
        push %r9
        push %r10
        push %r11
        mov %rax, %rcx
        call answer
        pop %r11
        pop %r10
        pop %r9
        pop %r8
        pop %rdx
        pop %rsi
        pop %rdi
        pop %rcx
        mov program_stack, %rsp
        jmp *%rcx

// One entry of 16 bytes for each exception.
.global on_fault
.balign 16
on_fault:
        .set number, 0
        .rept 32
        .balign 16
        mov $number, %edi
        mov %rsp, %rsi
        jmp faulted
        .set number, number + 1
        .endr
faulted:
        mov $stack_end, %rsp
        call fault

.section .data
.balign 4096
tables: .quad pointers + 3
        .fill 511, 8, 0
pointers:
        .quad directory + 3
        .fill 511, 8, 0
directory:
        .set page, 0
        .rept 512
        .quad page * 0x200000 + 0x83
        .set page, page + 1
        .endr
descriptors:
        .quad 0, 0x00209a0000000000, 0x0000920000000000
descriptors_at:
        .word 23
        .long descriptors
program_stack:
        .quad 0
.global program
program:
        .incbin "program"

.section .bss
        .fill 65536, 1, 0
stack_end:

.section .note.GNU-stack, "", @progbits
