#!/bin/sh
# Resolves packages.list against the mirror and writes packages.lock: the exact
# .deb files, with their SHA-256, that every build installs until the next
# `make image-lock`. apt checks the archive's signatures here; later builds
# hold each file to its hash alone, and need no trust in a mirror.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keyring" ] || die "no $keyring: install debian-archive-keyring"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# resolve GROUP SUITES...: prints the lock's lines of a group.
resolve() {
	group=$1 dir=$work/$1
	shift
	mkdir -p "$dir/etc/apt.conf.d" "$dir/etc/preferences.d" "$dir/etc/trusted.gpg.d" "$dir/lists/partial" "$dir/cache/archives/partial"
	: >"$dir/status"
	for suite in "$@"; do
		case $suite in *-security) archive=debian-security ;; *) archive=debian ;; esac
		echo "deb [signed-by=$keyring] $(mirror $archive) $suite main"
	done >"$dir/etc/sources.list"
	cat >"$dir/apt.conf" <<END
Dir::Etc "$dir/etc"; Dir::State "$dir"; Dir::State::status "$dir/status"; Dir::Cache "$dir/cache";
APT::Architecture "amd64"; APT::Architectures { "amd64"; }; APT::Install-Recommends "false";
APT::Sandbox::User "root"; Acquire::Languages "none"; Acquire::Retries "3";
END
	export APT_CONFIG="$dir/apt.conf"
	apt-get -qq update >"$dir/log" 2>&1 || { cat "$dir/log" >&2; die "apt-get update failed"; }
	for list in "$dir"/lists/*_InRelease; do
		sed -n '1,30s/^Date: //p' "$list"
	done | while read -r d; do date -u -d "$d" +%Y%m%dT%H%M%SZ; done >>"$work/dates"
	names=$(sed -n "s/^$group //p" "$here/packages.list")
	case $group in
	kernel*) # the metapackage's one dependency, by itself; newer kernels are split into base, kernel and modules
		image=$(apt-cache show --no-all-versions "$names" | sed -n 's/^Depends:.* \(linux-image-[0-9][^ ,]*\).*/\1/p' | head -n 1)
		apt-cache show --no-all-versions "$image" | sed -n 's/^Depends: //p' | tr ',' '\n' |
			sed -n 's/^ *\(linux-\(base\|binary\|modules\)-[0-9][^ ]*\).*/\1/p' | grep . || echo "$image" ;;
	*)
		# shellcheck disable=SC2086  # the names are meant to be split
		apt-get -qq --simulate install '?essential' $names | sed -n 's/^Inst \([^ ]*\) (\([^ ]*\) .*/\1=\2/p' ;;
	esac >"$dir/chosen"
	[ -s "$dir/chosen" ] || die "nothing found for group $group"
	xargs apt-cache show --no-all-versions <"$dir/chosen" | awk -v group="$group" '
		function flush() {
			if (p) print group, p, v, sha, (f ~ /^pool\/updates\// ? "debian-security" : "debian"), f
			p = ""
		}
		/^Package: / { flush(); p = $2 }
		/^Version: / { v = $2 } /^SHA256: / { sha = $2 } /^Filename: / { f = $2 }
		END { flush() }' | LC_ALL=C sort -u
}

{
	resolve tools trixie trixie-security
	resolve root trixie trixie-security
	resolve kernel trixie trixie-security
	resolve kernel-backports trixie-backports
} >"$work/lock"
stamp=$(LC_ALL=C sort "$work/dates" | tail -n 1)
{
	echo "# Written by make image-lock: group, package, version, SHA-256, archive, path."
	echo "# list $(sha256sum <"$here/packages.list" | cut -d' ' -f1)"
	echo "# date $stamp"
	cat "$work/lock"
} >"$here/packages.lock.new"
mv "$here/packages.lock.new" "$here/packages.lock"
say "packages.lock: $(grep -vc '^#' "$here/packages.lock") packages as of $stamp"
