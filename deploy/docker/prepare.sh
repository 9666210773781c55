#!/bin/sh
# Makes what the containers of compose.yaml need to know of each other, once: passwords, and the broker's definitions
# with their hashes. Run again it keeps the passwords that are there. Nobody but the user of each file reads it.
#   prepare.sh FOLDER
set -eu
umask 077
folder=$1
mkdir -p "$folder"
chmod 711 "$folder" # a file's name is no secret, and each container finds its own

own() { # FILE UID: hand a file to the user of a container; where we may not, it stays ours
  [ "$(id -u)" != 0 ] || chown "$2:$2" "$1"
}

jef definitions --passwords "$folder/users" >"$folder/definitions.new"
chmod 644 "$folder/definitions.new"
mv "$folder/definitions.new" "$folder/definitions.json"

cp "$folder/users/jef-daemon" "$folder/jef-daemon"
own "$folder/jef-daemon" 10001

for service in postgres:999 grafana:472; do
  file=$folder/${service%:*}
  [ -s "$file" ] || python3 -c 'import secrets; print(secrets.token_urlsafe(24))' >"$file"
  own "$file" "${service#*:}"
done
