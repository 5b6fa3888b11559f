#!/bin/sh
# chroot.sh GROUP OUT.tar: installs the locked packages of a group into a tar,
# from a repository of those files alone: the resolver has nothing else to
# choose from, and no network. The same lock gives the same bytes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
group=$1 out=$2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir "$work/repo"
awk -v g="$group" '$1 == g { print $2, $4, $6 }' "$here/packages.lock" | while read -r name sha path; do
	file=$(basename "$path")
	ln "$debs/$sha.deb" "$work/repo/$file" 2>/dev/null || cp "$debs/$sha.deb" "$work/repo/$file"
	chmod 644 "$work/repo/$file"
	dpkg-deb -f "$work/repo/$file"
	printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$file" "$(stat -c %s "$work/repo/$file")" "$sha"
done >"$work/repo/Packages"
names=$(awk -v g="$group" '$1 == g { printf "%s%s", sep, $2; sep = "," }' "$here/packages.lock")

set --
case $group in
root)
	# Documentation, translations and the tests of Python's library are never unpacked.
	set -- --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/i18n/*' --dpkgopt='path-exclude=/usr/lib/locale/*' \
		--dpkgopt='path-exclude=/usr/share/lintian/*' --dpkgopt='path-exclude=/usr/share/bash-completion/*' \
		--dpkgopt='path-exclude=/usr/share/zsh/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
		--customize-hook="$here/python.sh"
	;;
esac
umask 022
export SOURCE_DATE_EPOCH=$epoch
log=$work/log
mmdebstrap --quiet --variant=custom --architectures=amd64 --include="$names" --mode=auto \
	--aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::AllowInsecureRepositories "true"' \
	--dpkgopt=force-unsafe-io --setup-hook='mkdir -p "$1/etc"' "$@" \
	'' "$work/out.tar" "deb [trusted=yes] copy:$work/repo ./" >"$log" 2>&1 ||
	{ tail -n 30 "$log" >&2; die "mmdebstrap failed"; }
cp "$work/out.tar" "$out.$$" && mv "$out.$$" "$out"
