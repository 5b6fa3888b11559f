#!/bin/sh
# fetch.sh GROUP...: brings the locked .deb files of the groups into the cache,
# each held to its SHA-256, whoever served it. A file that the mirror no longer
# has is looked for on snapshot.debian.org as of the lock's date; a build never
# takes another version instead.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

lock=$here/packages.lock
[ "$(sed -n 's/^# list //p' "$lock")" = "$(sha256sum <"$here/packages.list" | cut -d' ' -f1)" ] ||
	die "packages.list is not what packages.lock was made from: run make image-lock"
stamp=$(sed -n 's/^# date //p' "$lock")
mkdir -p "$debs"
# Two builds share the cache; one of them fetches.
exec 8>"$debs/.lock"
flock 8

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for group in "$@"; do
	awk -v g="$group" '$1 == g { print $4, $5, $6 }' "$lock"
done | sort -u >"$work/want"

# pass BASE-OF-ARCHIVE...: fetches what is missing; the name of a file in the cache is its hash.
missing() { while read -r sha archive path; do [ -e "$debs/$sha.deb" ] || echo "$sha $archive $path"; done <"$work/want"; }
fetch_from() {
	missing >"$work/missing"
	[ -s "$work/missing" ] || return 0
	while read -r sha archive path; do
		case $archive in debian) base=$1 ;; *) base=$2 ;; esac
		# A "+" is itself in a path, but some mirrors want it escaped.
		printf 'url = "%s/%s"\noutput = "%s/%s.part"\n' "$base" "$(printf %s "$path" | sed 's/+/%2b/g')" "$work" "$sha"
	done <"$work/missing" >"$work/curl"
	curl --silent --fail --location --connect-timeout 20 --retry 3 --parallel --parallel-max 8 --config "$work/curl" 2>/dev/null || true
	while read -r sha archive path; do
		part=$work/$sha.part
		[ -e "$part" ] || continue
		if [ "$(sha256sum <"$part" | cut -d' ' -f1)" = "$sha" ]; then
			mv "$part" "$debs/$sha.deb.$$" && mv "$debs/$sha.deb.$$" "$debs/$sha.deb"
		else
			say "$path: the mirror's file is not the locked one, dropped"
			rm -f "$part"
		fi
	done <"$work/missing"
}

fetch_from "$(mirror debian)" "$(mirror debian-security)"
if [ -n "$(missing)" ]; then
	say "$(missing | wc -l) locked files are gone from the mirror (it has moved since $stamp); trying snapshot.debian.org"
	snapshot=${CVM_DEBIAN_SNAPSHOT:-https://snapshot.debian.org/archive}
	fetch_from "$snapshot/debian/$stamp" "$snapshot/debian-security/$stamp"
fi
if [ -n "$(missing)" ]; then
	missing | while read -r sha archive path; do say "not to be had: $archive/$path sha256:$sha"; done
	die "the mirror has changed: put these files into $debs as SHA256.deb, or take its present versions with make image-lock and review the diff of packages.lock"
fi
