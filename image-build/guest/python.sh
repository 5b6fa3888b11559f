#!/bin/sh
# python.sh ROOT: compiles Python's library once, so that no boot does, and in
# a form that depends on nothing but the source (no mtimes).
set -eu
root=$1
find "$root/usr/lib/python3" "$root"/usr/lib/python3.* -type d \( -name __pycache__ -o -name tests -o -name test -o -name idlelib -o -name tkinter -o -name lib2to3 -o -name ensurepip -o -name turtledemo -o -name pydoc_data \) -prune -exec rm -rf {} +
chroot "$root" env PYTHONHASHSEED=0 python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.[0-9]*
