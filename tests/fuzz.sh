#!/bin/sh
# Runs every fuzz target of the given modules for a bounded time, one after the
# other: go test takes one target of one package at a time.
#
#   tests/fuzz.sh TIME MODULE ...
set -eu

time=$1
shift
ran=0
root=$PWD
for module; do
	cd "$root/$module"
	list=$(mktemp)
	# A nested module is fuzzed in its own turn.
	for file in $(go list -f '{{$d := .Dir}}{{range .TestGoFiles}}{{$d}}/{{.}} {{end}}{{range .XTestGoFiles}}{{$d}}/{{.}} {{end}}' ./...); do
		sed -n "s|^func \(Fuzz[A-Za-z0-9_]*\)(.*|$(dirname "$file") \1|p" "$file" >>"$list"
	done
	while read -r dir target; do
		echo "fuzz: ${dir#"$root"/} $target $time"
		# Unbounded, making one new input of 20 KB small takes longer than the run.
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "$dir" </dev/null
		ran=$((ran + 1))
	done <"$list"
	rm -f "$list"
done
echo "fuzz: $ran targets, no failure"
