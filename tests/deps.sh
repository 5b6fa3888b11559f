#!/bin/sh
# Installs what building and testing needs, and only what is missing:
# Debian packages through apt-get (with sudo when not root), and the stock
# tools that our own are tested against, built from source at pinned versions
# into a cache outside the tree. Quiet when nothing is missing.
#
#   tests/deps.sh                      everything
#   tests/deps.sh apt                  the Debian packages alone
#   tests/deps.sh go                   only check that the Go toolchain will do
#   tests/deps.sh tools [NAME ...]     the stock tools alone (all, or those named)
#   tests/deps.sh image                the Debian packages that building the guest image needs
#   tests/deps.sh vm                   those that booting it needs
#
# CVM_TOOLS names the cache, default ~/.cache/cvm-agent/tools; programs go to
# its bin/. A tool's stamp file carries its version, so a raised pin rebuilds it.
set -eu

tools_dir=${CVM_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/cvm-agent/tools}
root=$(cd "$(dirname "$0")/.." && pwd)

# name, package, version. The order is that of need: tests wait for the first.
tools='
registry      github.com/distribution/distribution/v3/cmd/registry       v3.1.2
cosign        github.com/sigstore/cosign/v2/cmd/cosign                   v2.6.5
crane         github.com/google/go-containerregistry/cmd/crane           v0.22.1
syft          github.com/anchore/syft/cmd/syft                           v1.57.0
golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint     v2.15.0
'

# gcc and libc6-dev are for the race detector and the PKCS #11 variant: nothing
# that `make build` makes uses cgo. postgresql and softhsm2 are what the
# broker's storage and KEK are tested against.
packages='ca-certificates crun curl gcc git iproute2 jq libc6-dev make mmdebstrap
podman postgresql procps runc skopeo softhsm2 swtpm swtpm-tools systemd uidmap zstd'

# The image's own tools run in a chroot of their own (image-build/guest); these
# make and fill it. `make test` needs none of them.
image_packages='ca-certificates curl debian-archive-keyring jq mmdebstrap util-linux uidmap'
vm_packages='fdisk ovmf qemu-system-x86 swtpm swtpm-tools'

say() { printf 'deps: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# missing_packages prints, on one line, those not installed.
missing_packages() {
	for p in $packages; do
		case $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true) in
		installed) ;;
		*) printf '%s ' "$p" ;;
		esac
	done
	# Any Go from 1.21 on fetches the toolchain that go.mod names by itself
	# (GOTOOLCHAIN=auto), so Debian's is good enough to start from.
	command -v go >/dev/null 2>&1 || printf 'golang-go '
}

install_packages() {
	missing=$(missing_packages)
	[ -n "$missing" ] || return 0
	[ -e /etc/debian_version ] ||
		die "this is neither Debian nor Ubuntu; install by hand: $missing"
	sudo=
	if [ "$(id -u)" != 0 ]; then
		command -v sudo >/dev/null 2>&1 || die "not root and no sudo; install by hand: $missing"
		sudo=sudo
	fi
	say "installing Debian packages: $missing"
	log=$(mktemp)
	# shellcheck disable=SC2086  # the list is meant to be split
	{ $sudo apt-get update -q &&
		$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing; } \
		>"$log" 2>&1 || { tail -n 20 "$log" >&2; rm -f "$log"; die "apt-get failed"; }
	rm -f "$log"
}

check_go() {
	want=$(sed -n 's/^go //p' "$root/go.mod")
	have=$(cd "$root" && go env GOVERSION 2>/dev/null) ||
		die "go $(go version 2>/dev/null | cut -d' ' -f3) cannot get the toolchain $want that go.mod names: install Go $want or newer, or allow GOTOOLCHAIN=auto"
	oldest=$(printf '%s\n%s\n' "$want" "${have#go}" | sort -V | head -n 1)
	[ "$oldest" = "$want" ] || die "Go $want or newer is needed, found $have"
}

install_tools() {
	check_go
	mkdir -p "$tools_dir/bin" "$tools_dir/stamps"
	# One run at a time: two would compile the same thing twice.
	exec 9>"$tools_dir/lock"
	flock -n 9 || { say "waiting for another run to finish building the stock tools"; flock 9; }
	printf '%s\n' "$tools" | while read -r name package version; do
		[ -n "$name" ] || continue
		case " $* " in '  ' | *" $name "*) ;; *) continue ;; esac
		stamp=$tools_dir/stamps/$name
		if [ -x "$tools_dir/bin/$name" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$version" ]; then
			continue
		fi
		say "building $name $version into $tools_dir/bin (once; minutes on a small machine)"
		rm -f "$stamp"
		(cd / && GOFLAGS=-trimpath CGO_ENABLED=0 GOBIN="$tools_dir/bin" \
			go install -ldflags '-s -w' "$package@$version") ||
			die "building $name $version failed"
		printf '%s\n' "$version" >"$stamp"
	done
}

case ${1:-all} in
all)
	install_packages
	install_tools
	;;
apt) install_packages ;;
image)
	packages=$image_packages
	install_packages
	;;
vm)
	packages="$image_packages $vm_packages"
	install_packages
	;;
go) check_go ;;
tools)
	shift
	install_tools "$@"
	;;
*) die "usage: tests/deps.sh [apt | go | image | vm | tools [NAME ...]]" ;;
esac
