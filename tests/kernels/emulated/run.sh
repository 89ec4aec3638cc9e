#!/usr/bin/env bash
# Runs check.cpp on an emulated processor, for instructions that this one lacks, and prints the paths that computed the
# same. There is no operating system: start.S and machine.c are what the program needs of one.
#
#   tests/kernels/emulated/run.sh corei7_icelake_u    AVX512-VNNI; Bochs 2.7, which Debian 12 has, will do
#   tests/kernels/emulated/run.sh sapphire_rapids     AVX-VNNI and AMX too; Bochs 3.0, which Debian 13 has
#
# Debian packages: g++ cmake bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso. BOCHS and BXSHARE
# name a Bochs that lies elsewhere. It takes a minute or more of one core.
set -euo pipefail
model=${1:?which processor? One that "bochs --help cpu" lists}
here=$(cd "$(dirname "$0")" && pwd)
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
cd "$made"

{
    cmake -S "$here/../../.." -B build -DSQAP_CHECK=ON -DCMAKE_EXE_LINKER_FLAGS=-static
    cmake --build build
    mv build/check program
    # Without vectors, which are not there before the machine is set up.
    gcc -O1 -Wall -Wextra -ffreestanding -fno-pic -fno-stack-protector -mgeneral-regs-only -mno-red-zone \
        -fno-tree-loop-distribute-patterns -fno-asynchronous-unwind-tables -c "$here/machine.c"
    gcc -c "$here/start.S"
    mkdir -p disc/isolinux
    ld -T "$here/machine.ld" --oformat=binary -o disc/machine start.o machine.o
    cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/{ldlinux,mboot,libcom32}.c32 disc/isolinux
    echo "default mboot.c32 /machine" >disc/isolinux/isolinux.cfg
    xorriso -as mkisofs -o disc.iso -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 \
        -boot-info-table disc
} >log 2>&1 || { cat log >&2; exit 1; }

share=${BXSHARE:-/usr/share/bochs}
cat >settings <<END
display_library: term
cpu: model=$model, ips=100000000, reset_on_triple_fault=0
memory: guest=256, host=256
romimage: file=$share/BIOS-bochs-latest
vgaromimage: file=$share/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=printed
plugin_ctrl: speaker=0
panic: action=fatal
log: bochs.log
END
echo c >commands
# Its screen is a terminal's; it ends with what it takes for a panic, when the machine asks it to.
TERM=xterm script -qec "${BOCHS:-bochs} -q -f settings -rc commands" screen >/dev/null </dev/null || true
cat printed 2>/dev/null || tail -n 20 bochs.log >&2
grep -q '^exit 0' printed
