#!/bin/sh
# Packs a folder, one part after the other, and says how far it is: a program that knows nothing of jobs.
#   archive.sh FOLDER TARGET
set -eu
total=$(find "$1" -mindepth 1 -maxdepth 1 | wc -l)
done=0
mkdir -p "$2"
find "$1" -mindepth 1 -maxdepth 1 | sort | while read -r part; do
  tar -cz -C "$1" -f "$2/$(basename "$part").tar.gz" "$(basename "$part")"
  done=$((done + 1))
  echo "packed $done of $total: $(basename "$part")"
done
echo "$(du -sh "$2" | cut -f1) in $total archives"
