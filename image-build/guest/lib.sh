# Shared by build.sh and its parts; sourced, not run.
# shellcheck shell=sh

cache=${CVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cvm-agent}/image
debs=$cache/debs

say() { printf 'image: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# mirror ARCHIVE prints the base URL of debian or debian-security: the
# environment's, else the one that this machine's apt is set up with.
mirror() {
	case $1 in
	debian) url=${CVM_DEBIAN_MIRROR:-} ;;
	debian-security) url=${CVM_DEBIAN_SECURITY_MIRROR:-${CVM_DEBIAN_MIRROR:+${CVM_DEBIAN_MIRROR%/debian}/debian-security}} ;;
	esac
	[ -n "$url" ] || url=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
		tr ' \t' '\n\n' | grep -E "^https?://.*/$1/?\$" | head -n 1)
	[ -n "$url" ] || die "no mirror of $1 among apt's sources: set CVM_DEBIAN_MIRROR to the base URL of one"
	printf '%s\n' "${url%/}"
}

# started and took time a step: took prints and records the seconds since.
now() { date +%s.%N; }
took() {
	seconds=$(echo "$1 $(now)" | awk '{ printf "%.1f", $2 - $1 }')
	say "$(printf '%-28s %6s s' "$2" "$seconds")"
	[ -z "${steps:-}" ] || printf '%s\t%s\n' "$2" "$seconds" >>"$steps"
}

# epoch is the lock's date: every time stamp in the image that is not older.
epoch=$(date -u -d "$(sed -n 's/^# date \(....\)\(..\)\(..\)T\(..\)\(..\)\(..\)Z/\1-\2-\3 \4:\5:\6/p' "$here/packages.lock" 2>/dev/null)" +%s 2>/dev/null || echo 0)

# in_tools DIR CMD...: runs CMD in the tools chroot, with DIR at /mnt; mounts are private.
in_tools() {
	dir=$1
	shift
	unshare --mount --propagation private sh -c '
		mount --rbind /proc "$0/proc" && mount --rbind /dev "$0/dev" && mount --bind "$1" "$0/mnt" && shift &&
		exec chroot "$0" env SOURCE_DATE_EPOCH='"$epoch"' TZ=UTC LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin "$@"' "$tools" "$dir" "$@"
}

# tools_stamp names the tools chroot in the cache.
tools_stamp() { grep '^tools ' "$here/packages.lock" | cat - "$here/chroot.sh" | sha256sum | cut -c1-16; }
