#!/bin/sh
# build.sh base | seal: makes the guest image in two steps, so that another
# policy signer costs seconds and no new root.
#
#   build.sh lock                 takes the mirror's present versions into packages.lock
#   build.sh base                 prints the directory with the root, its hash tree, the kernel and modules;
#                                 cached by the recipe, the lock and our programs
#   build.sh seal --out DIR [--signers FP,FP] [--threshold N] [--version-floor N]
#            [--scratch tmpfs|disk] [--on-failure poweroff|wait [--wait SECONDS]] [--azure-thim URL] [--debug]
#                                 initrd, UKI and disk for these signers
#
# Environment: KERNEL=stable|backports, CVM_CACHE, CVM_BIN (our programs),
# CVM_DEBIAN_MIRROR, CVM_DEBIAN_SECURITY_MIRROR. README.md has the recipe.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
bin=${CVM_BIN:-$repo/bin}
case ${KERNEL:-stable} in
stable) KERNEL_GROUP=kernel ;;
backports) KERNEL_GROUP=kernel-backports ;;
*) echo "image: KERNEL is stable or backports" >&2 && exit 2 ;;
esac
export KERNEL_GROUP
. "$here/lib.sh"
umask 022

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d' >&2; exit 2; }
[ "${1:-}" != lock ] || exec "$here/lock.sh"
[ "$(id -u)" = 0 ] || die "needs root: it makes files of every owner and runs chroots (no loop devices, no mounts outside its own namespace)"
# Mounts are this process's own. Work is done in memory where there is enough:
# dpkg writes and syncs thousands of files, and a disk makes minutes of it.
[ -n "${CVM_IMAGE_NAMESPACE:-}" ] || exec unshare --mount --propagation private env CVM_IMAGE_NAMESPACE=1 "$0" "$@"
mkdir -p "$cache/tmp"
if [ "$(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo)" -gt 4194304 ]; then
	mount -t tmpfs -o mode=0755,size=80% tmpfs "$cache/tmp"
fi
export TMPDIR="$cache/tmp"
# Programs run by in_tools get nothing of the caller's environment but these.
export LC_ALL=C.UTF-8 TZ=UTC SOURCE_DATE_EPOCH="$epoch"
mkdir -p "$cache"

# The tools chroot, unpacked in the cache.
tools=$cache/tools-$(tools_stamp)
export tools

make_tools() {
	[ ! -e "$tools/.done" ] || return 0
	t=$(now)
	"$here/fetch.sh" tools
	"$here/chroot.sh" tools "$TMPDIR/tools.tar"
	rm -rf "$tools.$$"
	mkdir "$tools.$$"
	tar -xf "$TMPDIR/tools.tar" -C "$tools.$$" --exclude './dev/*'
	rm -f "$TMPDIR/tools.tar"
	touch "$tools.$$/.done"
	rm -rf "$tools"
	mv "$tools.$$" "$tools"
	took "$t" "tools chroot"
}

base_stamp() {
	{
		(cd "$repo" && find image-build/guest units -type f ! -name '*.md' ! -name '*_test.go' ! -path '*/testdata/*' ! -name seal.sh ! -name build.sh ! -name check.sh ! -name repro.sh -print0 | LC_ALL=C sort -z | xargs -0 sha256sum)
		sha256sum <"$bin/cvm-agent"
		sha256sum <"$bin/cvm-sbom"
		echo "$KERNEL_GROUP"
	} | sha256sum | cut -c1-16
}

base() {
	for p in cvm-agent cvm-sbom cvm-early cvmctl; do [ -x "$bin/$p" ] || die "$bin/$p is missing: make build"; done
	out=$cache/base-$(base_stamp)
	exec 7>"$cache/.lock"
	flock 7
	if [ ! -e "$out/roothash" ] || [ -n "${FRESH:-}" ]; then
		work=$(mktemp -d "$TMPDIR/work.XXXXXX")
		trap 'rm -rf "$work"' EXIT
		chmod 755 "$work"
		steps=$work/steps
		export steps
		make_tools
		t=$(now)
		"$here/fetch.sh" root "$KERNEL_GROUP"
		took "$t" "packages"
		root_stamp=$(grep '^root ' "$here/packages.lock" | cat - "$here/chroot.sh" "$here/python.sh" | sha256sum | cut -c1-16)
		tar=$cache/root-$root_stamp.tar
		if [ ! -e "$tar" ] || [ -n "${FRESH:-}" ]; then
			t=$(now)
			"$here/chroot.sh" root "$tar"
			took "$t" "Debian root"
		fi
		t=$(now)
		mkdir "$work/root" "$work/kernel" "$work/out"
		tar -xpf "$tar" -C "$work/root" --exclude './dev/*'
		for sha in $(awk -v g="$KERNEL_GROUP" '$1 == g { print $4 }' "$here/packages.lock"); do dpkg-deb -x "$debs/$sha.deb" "$work/kernel"; done
		took "$t" "unpack"
		t=$(now)
		unshare --mount --propagation private "$here/root.sh" "$work/root" "$work" "$work/kernel"
		took "$t" "root: files, cuts, SBOM"
		t=$(now)
		# Ownership and modes go in as they are; times are the epoch's, order is by name.
		find "$work/root" -xdev -newermt "@$epoch" -exec touch -h -d "@$epoch" {} +
		in_tools "$work" mksquashfs /mnt/root /mnt/out/root.squashfs -comp zstd -Xcompression-level 3 -b 256K \
			-noappend -no-progress -quiet -no-exports >&2
		took "$t" "squashfs"
		t=$(now)
		in_tools "$work" veritysetup format /mnt/out/root.squashfs /mnt/out/root.verity --root-hash-file /mnt/out/roothash \
			--salt "$(printf 'cvm-agent guest root' | sha256sum | cut -d' ' -f1)" --uuid 5f3c2e5a-6f5c-4d0b-8d5e-63766d616765 >/dev/null
		took "$t" "verity"
		# In /boot, or, of a split kernel, beside its modules.
		cp "$(find "$work/kernel" -name 'vmlinuz*' -type f)" "$work/out/vmlinuz"
		basename "$work"/kernel/usr/lib/modules/* >"$work/out/release"
		cp -R "$work/early" "$work/early.modules" "$work/scratch.modules" "$work/device.json" "$work/manifest.json" "$work/sbom.spdx.json" "$work/out/"
		cp "$work/root/usr/lib/os-release" "$work/out/os-release"
		(cd "$work/root" && find . -xdev -type f -printf '%s\t%P\n' | LC_ALL=C sort -rn | head -n 10) >"$work/out/largest"
		(cd "$work/root" && du -sk --apparent-size . | cut -f1) >"$work/out/root.kib"
		cp "$steps" "$work/out/steps"
		rm -rf "$out" "$out.$$"
		cp -R "$work/out" "$out.$$" && mv "$out.$$" "$out"
		rm -rf "$work"
		trap - EXIT
		# Old roots go; not the latest, which another seal may be reading.
		find "$cache" -maxdepth 1 -name 'base-*' -mmin +120 -exec rm -rf {} +
	fi
	flock -u 7
	printf '%s\n' "$out"
}

case ${1:-} in
base) base ;;
seal)
	shift
	dir=$(base)
	make_tools
	export bin
	exec "$here/seal.sh" "$dir" "$@"
	;;
*) usage ;;
esac
