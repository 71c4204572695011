# The kernel stage of build: a kernel of the distribution, its headers, and the modules of its that the distribution leaves out. Sourced
# by build. The stage is named after the hash of this directory, so whatever changes its outcome belongs in here.
# shellcheck shell=bash

# What init needs, wires, verbs, and the rest of what suites load with lab-modules.
MODULES="virtio_pci 9pnet_virtio 9p overlay virtio_net virtio_rng dummy veth sch_netem sch_tbf sch_htb tcp_diag tls crc32_generic crc32c_generic
    ib_uverbs rdma_ucm rdma_rxe siw vfio vfio_iommu_type1 iommufd mdev mtty kvm-amd vsock vsock_loopback"

# build_kernel VERSION DIRECTORY
build_kernel() {
    local version=$1 stage=$2 release series source
    release=${version%-amd64}
    series=${LAB_KERNEL#linux-image-}
    series=${series%-amd64}
    mkdir -p "$stage"/{debs,image,headers,source,modules}
    fetch "$stage/debs" "linux-image-$version" "linux-headers-$version" "linux-headers-$release-common" "linux-kbuild-$release" "linux-source-$series"
    took "fetched $(du -sh "$stage/debs" | cut -f 1) of packages"

    unpack "$stage"/debs/linux-image-*.deb "$stage/image" './boot/vmlinuz*' './lib/modules/*'
    mv "$stage/image/boot/vmlinuz-$version" "$stage/vmlinuz.new"
    for source in "$stage"/debs/linux-headers-*.deb "$stage"/debs/linux-kbuild-*.deb; do unpack "$source" "$stage/headers" './*'; done
    dpkg-deb --fsys-tarfile "$stage"/debs/linux-source-*.deb | tar -xO --wildcards '*/linux-source-*.tar.xz' | xz -dc -T2 |
        tar -x -C "$stage/source" --strip-components=1 --wildcards '*/drivers/vfio/*.[ch]' '*/drivers/iommu/iommu-priv.h' \
            '*/drivers/iommu/iommufd/*.[ch]' '*/drivers/infiniband/sw/siw/*.[ch]' '*/samples/vfio-mdev/mtty.c' '*/lib/interval_tree.c'
    took "unpacked kernel $version"

    # The headers' makefile names the place where the package would be installed.
    sed -i "s#/usr/src/linux-headers#$stage/headers/usr/src/linux-headers#" "$stage/headers/usr/src/linux-headers-$version/Makefile"
    take_sources "$stage/source" "$stage/modules"
    rm -rf "$stage/debs" "$stage/source"
    compile_modules "$version" "$stage"
    install_modules "$version" "$stage"
    collect_modules "$stage/image" "$version" "$stage/collected"
    rm -rf "$stage/image"
    took "built VFIO, iommufd, mtty and siw"
    mv "$stage/vmlinuz.new" "$stage/vmlinuz" # last: now the stage is whole
}

# The kernel's files that kernel/Kbuild names, in one directory.
take_sources() {
    local from=$1 to=$2
    cp "$LAB_DIR/kernel/Kbuild" "$to/"
    cp "$from"/drivers/vfio/{vfio_main,group,container,virqfd,device_cdev,vfio_iommu_type1}.c "$from/drivers/vfio/vfio.h" "$to/"
    cp "$from/drivers/vfio/iommufd.c" "$to/vfio_iommufd.c" # iommufd.o is the name of a module
    cp "$from"/drivers/iommu/iommufd/*.[ch] "$from/drivers/iommu/iommu-priv.h" "$from/samples/vfio-mdev/mtty.c" "$to/"
    rm "$to/selftest.c"
    sed -i 's#"\.\./iommu-priv\.h"#"iommu-priv.h"#' "$to"/*.[ch]
    # The span iterator of interval trees, which the kernel has only with iommufd: that part of the file, and no exports.
    {
        printf '#include <linux/%s.h>\n' interval_tree interval_tree_generic compiler bug
        sed -n '/^#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER/,/^#endif/p' "$from/lib/interval_tree.c" | sed '1d;$d' | grep -v EXPORT_SYMBOL
    } >"$to/span_iter.c"
    mkdir "$to/siw" "$to/labdev"
    cp "$from"/drivers/infiniband/sw/siw/*.[ch] "$to/siw/"
    {
        echo 'obj-m := siw.o'
        printf 'siw-y :='
        (cd "$to/siw" && printf ' %s' *.c | sed 's/\.c/.o/g')
        echo
    } >"$to/siw/Kbuild"
    : >"$to/labdev/Kbuild" # ours comes with the image
}

compile_modules() {
    local version=$1 stage=$2 log
    log=$(mktemp)
    make -s -C "$stage/headers/usr/src/linux-headers-$version" M="$stage/modules" -j"$(nproc)" CONFIG_DEBUG_INFO_BTF_MODULES= modules >"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        fail 1 "the modules do not compile against kernel $version (log: $log)"
    }
    rm "$log"
}

install_modules() {
    local version=$1 stage=$2 root=$2/image
    rm -f "$root/lib/modules/$version"/kernel/drivers/vfio/{vfio,vfio_iommu_type1}.ko*
    mkdir -p "$root/lib/modules/$version/updates"
    find "$stage/modules" -name '*.ko' -exec cp {} "$root/lib/modules/$version/updates/" \;
    depmod -b "$root" "$version" 2>/dev/null
}

# The modules that the lab loads, with what they need, uncompressed and without debug information: they load faster so.
collect_modules() {
    local root=$1 version=$2 into=$3 name file target
    mkdir -p "$into"
    for name in $MODULES; do
        : >"$into/$name.list" # stays empty if the kernel has it built in
        modprobe -d "$root" -S "$version" --show-depends "$name" | sed -n 's/^insmod \([^ ]*\).*/\1/p' >"$into/$name.files"
        while read -r file; do
            target=$into/$(basename "${file%.xz}")
            [[ -e $target ]] || case $file in
            *.xz) xz -dc "$file" >"$target" && strip --strip-debug "$target" ;;
            *) strip --strip-debug -o "$target" "$file" ;;
            esac
            basename "$target" >>"$into/$name.list"
        done <"$into/$name.files"
        rm "$into/$name.files"
    done
}

# unpack DEB DIRECTORY PATTERN...: files of a package.
unpack() { dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --wildcards "${@:3}"; }

# Everything comes from the distribution's archive by its own tool, which checks the signatures.
fetch() {
    local sandbox=()
    ((EUID)) || sandbox=(-o APT::Sandbox::User=root)
    (cd "$1" && apt-get -qq "${sandbox[@]}" download "${@:2}" >/dev/null) ||
        fail 69 "could not fetch ${*:2}: is the archive reachable, and are its lists fresh (apt-get update)?"
}
