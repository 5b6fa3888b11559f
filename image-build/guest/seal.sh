#!/bin/sh
# seal.sh BASE OPTIONS: initrd, UKI and disk around a built root. Called by
# build.sh seal, which documents the options.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
base=$1
shift
out='' signers='' threshold=1 floor=1 debug=false failure=poweroff scratch=tmpfs thim='' wait=60
while [ $# -gt 0 ]; do
	case $1 in
	--debug) debug=true; shift; continue ;;
	esac
	[ $# -gt 1 ] || die "$1 takes a value"
	case $1 in
	--out) out=$2 ;;
	--signers) signers=$2 ;;
	--threshold) threshold=$2 ;;
	--version-floor) floor=$2 ;;
	--scratch) scratch=$2 ;;
	--on-failure) failure=$2 ;;
	--wait) wait=$2 ;;
	--azure-thim) thim=$2 ;;
	*) die "unknown option $1" ;;
	esac
	shift 2
done
[ -n "$out" ] || die "seal takes --out DIR"
case $threshold$floor$wait in *[!0-9]*) die "--threshold, --version-floor and --wait take numbers" ;; esac
case $scratch in tmpfs | disk) ;; *) die "--scratch is tmpfs or disk" ;; esac
case $thim in '' | http://*) ;; *) die "--azure-thim takes a base URL, as http://169.254.169.254" ;; esac
case $thim in *[!A-Za-z0-9:/._-]*) die "--azure-thim takes a base URL" ;; esac
case $failure in poweroff | wait) ;; *) die "--on-failure is poweroff or wait" ;; esac
[ "$wait" -ge 1 ] && [ "$wait" -le 600 ] || die "--wait is $wait, expected 1 to 600 seconds"
list=$(printf '%s' "$signers" | tr ',' '\n' | grep . | LC_ALL=C sort -u || true)
count=$(printf '%s\n' "$list" | grep -c . || true)
printf '%s\n' "$list" | grep -v '^$' | grep -qvE '^[0-9a-f]{64}$' &&
	die "--signers takes SHA-256 fingerprints of public keys, 64 lowercase hex digits each, separated by commas"
[ "$count" = 0 ] || [ "$threshold" -ge 1 ] && [ "$threshold" -le "$count" ] || [ "$count" = 0 ] ||
	die "--threshold is $threshold, expected 1 to $count"

work=$(mktemp -d "$TMPDIR/seal.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
steps=$work/steps
cp "$base/steps" "$steps"
t=$(now)

roothash=$(cat "$base/roothash")
uuid() { printf %s "$1" | sed 's/\(.\{8\}\)\(.\{4\}\)\(.\{4\}\)\(.\{4\}\)\(.\{12\}\)/\1-\2-\3-\4-\5/'; }
root_uuid=$(uuid "$(printf %s "$roothash" | cut -c1-32)")
verity_uuid=$(uuid "$(printf %s "$roothash" | cut -c33-64)")

# The command line. README.md says what each word is for.
cmdline="console=ttyS0 roothash=$roothash ro systemd.import_credentials=no systemd.gpt_auto=no lockdown=integrity ds=nocloud;s=file:///run/cvm-agent/seed/ panic=-1 no_timer_check"
if [ $debug = true ]; then
	cmdline="$cmdline cvm.debug=1 systemd.journald.forward_to_console=1 systemd.show_status=yes"
else
	cmdline="$cmdline quiet"
fi
printf %s "$cmdline" >"$work/cmdline"

# The initrd: early stage, its configuration, the agent's, modules.
i=$work/initrd
mkdir -p "$i/etc/cvm-agent" "$i/usr/lib" "$i/proc" "$i/sys" "$i/dev" "$i/run" "$i/sysroot"
mkdir "$i/usr/lib/modules"
cat "$base/early.modules" >"$work/modules"
[ $scratch = tmpfs ] || cat "$base/scratch.modules" >>"$work/modules"
{ cat "$work/modules" && jq -r '.[].modules[]' "$base/device.json"; } | sort -u | while read -r f; do
	cp "$base/early/usr/lib/modules/$f" "$i/usr/lib/modules/"
done
install -m 755 "$bin/cvm-early" "$i/init"
printf '%s\n' "$list" | jq -Rn --arg cmdline "$cmdline" --arg failure $failure --arg scratch $scratch --rawfile modules "$work/modules" --slurpfile devices "$base/device.json" \
	--argjson threshold "$threshold" --argjson floor "$floor" --argjson debug $debug --argjson wait "$wait" \
	'{cmdline: $cmdline, signers: [inputs | select(. != "")], threshold: $threshold, versionFloor: $floor, debug: $debug,
	onFailure: $failure, waitSeconds: $wait, modules: ($modules | split("\n") | map(select(. != ""))), devices: $devices[0], scratch: $scratch}' >"$i/etc/cvm-agent/early.json"
{
	echo "# Written by image-build/guest/seal.sh; part of the measured initrd."
	echo "initdata: /run/cvm-agent/initdata.toml"
	echo "trust:"
	echo "  signers: [$(printf '%s' "$list" | paste -sd, | sed 's/,/, /g')]"
	echo "  threshold: $threshold"
	echo "  versionFloor: $floor"
	echo "tpm: device:/dev/tpmrm0"
	[ -z "$thim" ] || echo "azure: {thim: \"$thim\"}"
	echo "stateDir: /var/lib/cvm-agent"
	echo "runDir: /run/cvm-agent"
	echo "storage: {graphRoot: /var/lib/containers/storage, runRoot: /run/containers/storage}"
	echo "podmanSocket: /run/podman/podman.sock"
	echo "controlSocket: /run/cvm-agent/control.sock"
	echo "controlSerial: /dev/virtio-ports/org.cvm-agent.control"
	echo "powerOffOnDestroy: true"
	[ $failure = poweroff ] || echo "failureWait: ${wait}s"
	echo "socketGroup: cvm-operators"
	echo "sbomProgram: /usr/lib/cvm-agent/cvm-sbom"
} >"$i/etc/cvm-agent/agent.yaml"
find "$i" -type d -exec chmod 755 {} +
find "$i" -type f ! -name init -exec chmod 644 {} +
find "$i" -exec touch -h -d "@$epoch" {} +
in_tools "$work" sh -c 'cd /mnt/initrd && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet --reproducible -o -H newc -R 0:0 | zstd -q -15 -T1 >/mnt/initrd.cpio'
took "$t" "initrd"

t=$(now)
cp "$base/vmlinuz" "$work/vmlinuz"
{
	grep -vE '^(IMAGE_|VARIANT)' "$base/os-release"
	echo "IMAGE_ID=cvm-guest"
	[ $debug = false ] || printf 'VARIANT=debug\nVARIANT_ID=debug\n'
} >"$work/osrel"
in_tools "$work" ukify build --linux=/mnt/vmlinuz --initrd=/mnt/initrd.cpio --cmdline=@/mnt/cmdline --os-release=@/mnt/osrel \
	--uname="$(cat "$base/release")" --stub=/usr/lib/systemd/boot/efi/linuxx64.efi.stub --output=/mnt/uki.efi >"$work/log" 2>&1 ||
	{ cat "$work/log" >&2; die "ukify failed"; }
touch -d "@$epoch" "$work/uki.efi"
took "$t" "UKI"

t=$(now)
cp "$base/root.squashfs" "$base/root.verity" "$base/roothash" "$work/"
mkdir "$work/repart.d"
cat >"$work/repart.d/10-esp.conf" <<END
[Partition]
Type=esp
Format=vfat
CopyFiles=/mnt/uki.efi:/EFI/BOOT/BOOTX64.EFI
UUID=c12a7328-f81f-11d2-ba4b-63766d657370
SizeMinBytes=64M
SizeMaxBytes=64M
END
cat >"$work/repart.d/20-root.conf" <<END
[Partition]
Type=root-x86-64
Label=cvm-root
UUID=$root_uuid
CopyBlocks=/mnt/root.squashfs
ReadOnly=yes
END
cat >"$work/repart.d/30-verity.conf" <<END
[Partition]
Type=root-x86-64-verity
Label=cvm-verity
UUID=$verity_uuid
CopyBlocks=/mnt/root.verity
ReadOnly=yes
END
in_tools "$work" systemd-repart --offline=yes --empty=create --size=auto --sector-size=512 --seed=63766d2d-6167-656e-7400-000000000001 \
	--definitions=/mnt/repart.d --dry-run=no --no-pager --json=off /mnt/disk.raw >"$work/log" 2>&1 || { cat "$work/log" >&2; die "systemd-repart failed"; }
took "$t" "disk"

mkdir -p "$out"
cp "$base/sbom.spdx.json" "$work/"
jq --arg early "$(sha256sum <"$bin/cvm-early" | cut -d' ' -f1)" '.programs["/init"] = $early' "$base/manifest.json" >"$work/manifest.json"
# What a TPM holds once this image has booted, from the files alone.
"$bin/cvmctl" measure pcr --uki "$work/uki.efi" --format reference-values --label "cvm-guest-$(cut -c1-16 "$base/roothash")" >"$work/reference-values.yaml"
artefacts='disk.raw uki.efi vmlinuz initrd.cpio cmdline root.squashfs root.verity roothash manifest.json sbom.spdx.json reference-values.yaml'
for f in $artefacts; do
	printf '%s\t%s\t%s\n' "$f" "$(stat -c %s "$work/$f")" "$(sha256sum <"$work/$f" | cut -d' ' -f1)"
done >"$work/files"
jq -n --rawfile files "$work/files" --rawfile steps "$steps" --rawfile largest "$base/largest" --argjson debug $debug --arg roothash "$roothash" \
	--arg release "$(cat "$base/release")" --rawfile cmdline "$work/cmdline" --argjson kib "$(cat "$base/root.kib")" '
	def rows: split("\n") | map(select(. != "") | split("\t"));
	{debug: $debug, kernel: $release, roothash: $roothash, cmdline: $cmdline, pcr11Phases: [], rootBytesUnpacked: ($kib * 1024),
	files: ($files | rows | map({key: .[0], value: {bytes: (.[1] | tonumber), sha256: .[2]}}) | from_entries),
	largest: ($largest | rows | map({path: ("/" + .[1]), bytes: (.[0] | tonumber)})),
	seconds: ($steps | rows | map({key: .[0], value: (.[1] | tonumber)}) | from_entries)}' >"$work/image.json"
for f in $artefacts image.json; do
	chmod 644 "$work/$f"
	cp --sparse=always "$work/$f" "$out/$f.new" && mv "$out/$f.new" "$out/$f"
done

printf '\n%-16s %12s  %s\n' artefact bytes sha256
awk -F'\t' '{ printf "%-16s %12d  %s\n", $1, $2, $3 }' "$work/files"
printf '\nten largest of the root, %d MiB unpacked:\n' $(($(cat "$base/root.kib") / 1024))
awk -F'\t' '{ printf "%12d  /%s\n", $1, $2 }' "$base/largest"
printf '\nseconds (steps of a cached root are those of the build that made it):\n'
awk -F'\t' '{ printf "%8s  %s\n", $2, $1 }' "$steps"
echo
[ $debug = false ] || echo "DEBUG VARIANT: measured as such, not for keys that matter."
if [ "$count" = 0 ]; then
	echo "WARNING: no signers were named (SIGNERS=FP,FP): this image trusts nobody and refuses every launch."
else
	echo "trusts $threshold of $count policy signers, versions from $floor"
fi
echo "image: $out"
