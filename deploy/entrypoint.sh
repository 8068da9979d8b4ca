#!/bin/sh
# What a container runs: a program of the image, or else a command of hm with its words.
if command -v "${1:-}" > /dev/null 2>&1; then exec "$@"; fi
exec hm "$@"
