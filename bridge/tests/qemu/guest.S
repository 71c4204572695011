# The whole guest, as a firmware image of 64 KiB: it fills memory with pages that tell where they lie, and from then on writes four pages of a
# working set at every tick of the timer. What it wrote can be checked from outside, without its help:
#   0x2000                  u32: how many pages it has written in the working set (n)
#   1 MiB + 4 KiB × i       u32: the newest k <= n with k mod 2048 = i, for i below 2048 (0: none yet)
#   16 MiB + 4 KiB × i      u32: the page's own address, for the pages up to 112 MiB
        .code16
        .globl _start
_start:
        .org 0x400
real:   cli
        cld
        lgdtl %cs:(descriptors_end - _start)
        movl %cr0, %eax
        incw %ax
        movl %eax, %cr0
        ljmpl $0x08, $protected
        .code32
protected:
        movl $0x10, %eax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movl $0x9000, %esp
        xorl %eax, %eax
        movl %eax, 0x2000
        # Pages that tell where they lie.
        movl $0x1000000, %edi
fill:   movl %edi, (%edi)
        addl $0x1000, %edi
        cmpl $0x7000000, %edi
        jb fill
        # The local APIC passes the old interrupt controller's line on.
        movl $0x1ff, 0xfee000f0
        movl $0x700, 0xfee00350
        # Interrupt controllers: vectors from 0x20 and 0x28, only the timer open.
        movb $0x11, %al
        outb %al, $0x20
        outb %al, $0xa0
        movb $0x20, %al
        outb %al, $0x21
        movb $0x28, %al
        outb %al, $0xa1
        movb $0x04, %al
        outb %al, $0x21
        movb $0x02, %al
        outb %al, $0xa1
        movb $0x01, %al
        outb %al, $0x21
        outb %al, $0xa1
        movb $0xfe, %al
        outb %al, $0x21
        movb $0xff, %al
        outb %al, $0xa1
        # Timer: 500 Hz.
        movb $0x34, %al
        outb %al, $0x43
        movb $0x52, %al
        outb %al, $0x40
        movb $0x09, %al
        outb %al, $0x40
        # Interrupt table at 0x3000, 0x30 gates, all alike.
        movl $0x3000, %edi
        movl $0x30, %ecx
gates:  movl $interrupt, %eax
        movw %ax, (%edi)
        movl $0x8e000008, 2(%edi)
        shrl $16, %eax
        movw %ax, 6(%edi)
        addl $8, %edi
        loop gates
        movw $0x17f, 0x2ff0
        movl $0x3000, 0x2ff2
        lidt 0x2ff0
idle:   sti
        hlt
        jmp idle
        # Interrupts are open only at the hlt, so what they interrupted is dropped.
interrupt:
        movl $0x9000, %esp
        movb $0x20, %al
        outb %al, $0x20
        movl $4, %ecx
        movl 0x2000, %ebx
next:   incl %ebx
        movl %ebx, %edi
        andl $2047, %edi
        shll $12, %edi
        movl %ebx, 0x100000(%edi)
        movl %ebx, 0x2000
        loop next
        jmp idle
        .balign 8
        # Marked as accessed already: the processor can't write that into a ROM.
descriptors:
        .quad 0
        .quad 0x00cf9b000000ffff
        .quad 0x00cf93000000ffff
descriptors_end:
        .word 23
        .long descriptors
        .org 0xfff0
        .code16
        jmp real
        .org 0x10000
