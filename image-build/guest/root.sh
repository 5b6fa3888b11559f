#!/bin/sh
# root.sh ROOT WORK KERNELDIR: makes the image's root of an unpacked Debian one:
# our files in, what nobody needs out (units.keep, cut.list, modules.list), the
# manifest and SBOM of what is left into WORK. Runs as root in its own mounts.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
root=$1 work=$2 kernel=$3
repo=$(cd "$here/../.." && pwd)
bin=${CVM_BIN:-$repo/bin}
umask 022

# Kernel modules, by modules.list; the early stage's also into WORK, unpacked and in load order.
release=$(basename "$kernel"/usr/lib/modules/*)
mods=$root/usr/lib/modules/$release
mkdir -p "$mods"
cp "$kernel/usr/lib/modules/$release"/modules.* "$mods/"
(
	cd "$kernel/usr/lib/modules/$release/kernel"
	sed -n 's/^root //p' "$here/modules.list" | while read -r patterns; do
		for f in $patterns; do [ ! -e "$f" ] || find "$f" -name '*.ko*'; done
	done | sort -u
) >"$work/modules.kept"
mkdir -p "$work/mods.all/usr/lib"
ln -s usr/lib "$work/mods.all/lib"
# What they depend on comes along: modules.dep of the whole set says so.
cp -r "$kernel/usr/lib/modules" "$work/mods.all/usr/lib/"
in_tools "$work" depmod -b /mnt/mods.all "$release"
sed 's/:/ /' "$work/mods.all/usr/lib/modules/$release/modules.dep" >"$work/deps"
awk 'NR == FNR { want["kernel/" $1] = 1; next } $1 in want { for (i = 1; i <= NF; i++) print $i }' "$work/modules.kept" "$work/deps" | sort -u |
	while read -r f; do
		mkdir -p "$mods/$(dirname "$f")"
		cp "$kernel/usr/lib/modules/$release/$f" "$mods/$f"
	done
mkdir -p "$work/early/usr/lib/modules"
builtin=$kernel/usr/lib/modules/$release/modules.builtin
# chain NAME: the module's files in load order, what it depends on first; nothing when it is built in,
# or, by modules.list, has no name of its own in newer kernels.
chain() {
	# modules.dep lists what must be loaded first last.
	awk -v n="$1" 'function plain(s) { sub(/.*\//, "", s); sub(/\.ko.*/, "", s); gsub(/_/, "-", s); return s }
		plain($1) == plain(n) { for (i = NF; i >= 1; i--) print $i; found = 1 } END { exit !found }' "$work/deps" ||
		grep -qE "/$(echo "$1" | sed 's/[-_]/[-_]/g')\.ko" "$builtin" ||
		{ [ "$KERNEL_GROUP" != kernel ] && grep -qx "inside $1" "$here/modules.list"; } || die "modules.list names $1, which this kernel has not"
}
# names PATHS-OF-FILES: unpacks them for the initrd, prints their names there.
names() {
	while read -r f; do
		name=$(basename "${f%.xz}")
		[ -e "$work/early/usr/lib/modules/$name" ] || xz -dc "$kernel/usr/lib/modules/$release/$f" >"$work/early/usr/lib/modules/$name"
		echo "$name"
	done
}
for group in early scratch; do
	# Not in a pipe, which would swallow a missing module.
	for name in $(sed -n "s/^$group //p" "$here/modules.list"); do chain "$name"; done >"$work/paths"
	awk '!seen[$0]++' "$work/paths" | names >"$work/$group.modules"
done
for name in $(sed -n 's/^device //p' "$here/modules.list"); do
	chain "$name" | names >"$work/chain"
	in_tools "$work" modinfo -F alias "/mnt/early/usr/lib/modules/$(tail -n 1 "$work/chain")" | grep -vE '^(block-major|of:)' |
		jq -Rn --rawfile chain "$work/chain" '{aliases: [inputs], modules: ($chain | split("\n") | map(select(. != "")))}'
done | jq -s . >"$work/device.json"
rm -rf "$work/mods.all"
in_tools "$root" depmod -b /mnt "$release"
rm -f "$mods"/modules.alias "$mods"/modules.dep "$mods"/modules.symbols "$mods"/modules.builtin.alias "$mods"/modules.builtin.modinfo

# Our programs and configuration.
install -D -m 755 "$bin/cvm-agent" "$root/usr/bin/cvm-agent"
install -D -m 755 "$bin/cvm-sbom" "$root/usr/lib/cvm-agent/cvm-sbom"
install -D -m 644 "$repo/agent/README.md" "$root/usr/share/doc/cvm-agent/README.md"
cp -R "$here/root/." "$root/"
profile=$root/usr/share/containers/seccomp.json
jq -f "$here/seccomp.jq" "$profile" >"$work/seccomp.json"
cat "$work/seccomp.json" >"$profile"
for unit in "$repo"/units/*.service "$repo"/units/*.socket "$repo"/units/*.target "$repo"/units/*.path "$repo"/units/*.timer "$repo"/units/*.mount; do
	[ ! -e "$unit" ] || install -m 644 "$unit" "$root/usr/lib/systemd/system/"
done
for dir in sysusers.d tmpfiles.d sysctl.d udev/rules.d; do
	[ ! -d "$repo/units/$dir" ] || install -D -m 644 -t "$root/usr/lib/$dir" "$repo/units/$dir"/*
done
for dir in "$repo"/units/*.d; do # drop-ins of Debian's units
	case $(basename "$dir") in *.service.d | *.socket.d | *.target.d) install -D -m 644 -t "$root/usr/lib/systemd/system/$(basename "$dir")" "$dir"/* ;; esac
done
[ ! -d "$repo/units/system-preset" ] || install -D -m 644 -t "$root/usr/lib/systemd/system-preset" "$repo/units/system-preset"/*
mkdir -p "$root/etc/cvm-agent" "$root/var/lib/containers" "$root/var/lib/cvm-agent" "$root/var/lib/cloud"
chmod 700 "$root/var/lib/cvm-agent"
ln -sf /run/cvm-agent/agent.yaml "$root/etc/cvm-agent/agent.yaml"
ln -sf ../run/systemd/resolve/resolv.conf "$root/etc/resolv.conf"
echo localhost >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"

# cloud-init: its configuration is ours alone, and of its modules only those named.
keep=" $(grep -v '^#' "$repo/units/cloud-init/keep.list" | tr '\n' ' ') "
rm -rf "$root/etc/cloud/cloud.cfg.d"
install -m 644 "$repo/units/cloud-init/cloud.cfg" "$root/etc/cloud/cloud.cfg"
for f in "$root"/usr/lib/python3/dist-packages/cloudinit/config/cc_*.py "$root"/etc/cloud/templates/*; do
	name=$(basename "$f")
	case $keep in *" $name "*) continue ;; esac
	rm -f "$f" "$(dirname "$f")/__pycache__/${name%.py}".*
done
rm -rf "$root"/usr/lib/python3/dist-packages/cloudinit/cmd/devel/hotplug_hook.py "$root"/usr/lib/cloud-init/ds-identify

# Accounts: the group of the socket; no password, no shell for anyone.
chroot "$root" systemd-sysusers
sed -i -e '/^sync:/d' -e 's#:[^:]*$#:/usr/sbin/nologin#' "$root/etc/passwd"
sed -i 's/^\([^:]*\):[^:]*:[^:]*:/\1:!*:1:/' "$root/etc/shadow"

# Units: only those of units.keep and ours; enabled is what the presets say.
units=$root/usr/lib/systemd/system
keep=" $(grep -v '^#' "$here/units.keep" | tr '\n' ' ') emergency.service $(cd "$repo/units" && ls | tr '\n' ' ') "
for f in "$units"/*.service "$units"/*.socket "$units"/*.timer "$units"/*.mount "$units"/*.automount "$units"/*.path; do
	name=$(basename "$f")
	case $name in cvm-*) continue ;; esac
	case $keep in *" $name "*) continue ;; esac
	rm -f "$f"
	rm -rf "$f.d"
done
rm -rf "$units"/initrd* "$units"/getty* "$units"/kexec.target "$units"/rescue.target* "$units"/*hibernate* "$units"/*suspend* "$units"/*sleep* "$units"/system-update* "$units"/runlevel* "$units"/remote-* "$units"/factory-reset.target "$units"/storage-target-mode.target "$units"/ssh* "$units"/user@* "$units"/user-.slice.d "$units"/capsule* "$units"/graphical.target*
rm -rf "$root"/etc/systemd/system/*
rm -f "$root"/usr/lib/systemd/system-preset/9*
ln -sf multi-user.target "$units/default.target"
ln -sf /dev/null "$root/etc/systemd/system/ctrl-alt-del.target"
chroot "$root" systemctl preset-all >/dev/null 2>&1 || die "systemctl preset-all failed"
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -sf /usr/lib/systemd/system/cloud-init.target "$root/etc/systemd/system/multi-user.target.wants/cloud-init.target"
# Links are read inside the root, where their targets are.
chroot "$root" find /usr/lib/systemd/system /etc/systemd/system -xtype l ! -lname /dev/null -delete
find "$root/usr/lib/systemd/system" "$root/etc/systemd/system" -mindepth 1 -type d -empty -delete

# The cuts; dpkg's own state stays until the SBOM is made.
find "$root" -xdev -type f -perm /6000 -exec chmod ug-s {} +
grep -v '^#' "$here/cut.list" | tr ' ' '\n' | grep . | while read -r pattern; do
	case $pattern in /var/lib/dpkg) continue ;; esac
	# shellcheck disable=SC2086  # patterns are meant to be expanded
	rm -rf $root$pattern
done
chroot "$root" find /usr/bin /usr/sbin /etc/alternatives -xtype l -delete
rm -rf "$root"/boot/* "$root"/tmp/* "$root"/run/* "$root"/dev/* "$root"/usr/lib/.build-id "$root"/home/*
chroot "$root" ldconfig -X
rm -rf "$root/var/cache/ldconfig"
mkdir -p "$root/var/log/journal" && rmdir "$root/var/log/journal"
: >"$root/etc/machine-id"

# What is in it, and whence.
chroot "$root" true || die "the root does not run"
awk '/^Package: /{p=$2} /^Version: /{print p, $2}' "$root/var/lib/dpkg/status" | sort >"$work/installed"
awk '$1 == "root" { print $2, $3 }' "$here/packages.lock" | sort >"$work/locked"
cmp -s "$work/installed" "$work/locked" || { diff "$work/installed" "$work/locked" >&2 || true; die "what is installed is not what packages.lock lists"; }
awk -v k="$KERNEL_GROUP" '$1 == "root" || $1 == k { print $2, $3, $4 }' "$here/packages.lock" |
	jq -Rn --arg kernel "$release" --arg lock "$(sha256sum <"$here/packages.lock" | cut -d' ' -f1)" \
		--arg agent "$(sha256sum <"$bin/cvm-agent" | cut -d' ' -f1)" --arg sbom "$(sha256sum <"$bin/cvm-sbom" | cut -d' ' -f1)" \
		'{lock: $lock, kernel: $kernel, programs: {"/usr/bin/cvm-agent": $agent, "/usr/lib/cvm-agent/cvm-sbom": $sbom},
		packages: [inputs | split(" ") | {name: .[0], version: .[1], debSha256: .[2]}]}' >"$work/manifest.json"
# By a path that is in the image and the same everywhere: the scanner lists the directories above its root.
mount --bind "$root" /mnt
SOURCE_DATE_EPOCH=$epoch "$bin/cvm-sbom" scan --root /mnt --name cvm-guest --version "$(sed -n 's/^# date //p' "$here/packages.lock")" --output "$work/sbom.all"
umount /mnt
rm -rf "$root/var/lib/dpkg"
# dpkg's state was the scanner's, not the image's. The kernel was unpacked, not
# installed: no cataloger knows its package.
jq --arg kernel "$(awk -v k="$KERNEL_GROUP" '$1 == k { print $2, $3, $4 }' "$here/packages.lock")" 'def gone: .fileName? // "" | test("^/?var/lib/dpkg/"); (.files | map(select(gone) | .SPDXID)) as $ids
	| ($ids | map({key: ., value: true}) | from_entries) as $g
	| .files |= map(select(gone | not))
	| .relationships |= map(select(($g[.spdxElementId] or $g[.relatedSpdxElement]) | not))
	| reduce ($kernel | split("\n")[] | split(" ")) as [$name, $version, $sha] (.; ("SPDXRef-Package-deb-" + ($name | sub("-[0-9].*"; ""))) as $id
	| .packages += [{name: $name, SPDXID: $id, versionInfo: $version, supplier: "NOASSERTION", downloadLocation: "NOASSERTION", filesAnalyzed: false,
		checksums: [{algorithm: "SHA256", checksumValue: $sha}], licenseConcluded: "NOASSERTION", licenseDeclared: "GPL-2.0-only", copyrightText: "NOASSERTION",
		externalRefs: [{referenceCategory: "PACKAGE-MANAGER", referenceType: "purl",
			referenceLocator: ("pkg:deb/debian/" + ($name + "@" + $version | gsub("[+]"; "%2B")) + "?arch=amd64")}]}]
	| .relationships += [{spdxElementId: "SPDXRef-DocumentRoot-Directory-cvm-guest", relatedSpdxElement: $id, relationshipType: "CONTAINS"}])' "$work/sbom.all" >"$work/sbom.spdx.json"
rm -f "$work/sbom.all" "$work/installed" "$work/locked" "$work/deps"
