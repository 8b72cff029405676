#!/bin/sh
# The certificates and keys of a federation, made beside this script:
#
#   deploy/certs/make.sh server [HOST...]   server.crt and server.key for a SuperLink of these
#                                           names and addresses, and on this machine; ca.crt,
#                                           by which SuperNodes and users know it
#   deploy/certs/make.sh node NAME...       NAME.key for a SuperNode, NAME.key.pub to register
#
# A node's owner makes its key and sends only the .pub. ca.key signs later certificates: move
# it to a safe place. To renew, delete server.crt and server.key and run it again; nobody else
# notices. Needs OpenSSL 3, and ssh-keygen for the nodes, whose keys Flower reads in its format.
set -eu
umask 077
cd "$(dirname "$0")"
new=$(mktemp -d ./new.XXXXXX) # what fails halfway leaves nothing behind
trap 'rm -r "$new"' EXIT

fail() {
  echo "certs/make.sh: $*" >&2
  exit 1
}

fresh() {
  for file; do
    [ ! -e "$file" ] || fail "certs/$file exists. Delete it if nobody needs it any more."
  done
}

certify() { # name, days, options
  name=$1 days=$2
  shift 2
  # No configuration, for the machine's own may add what contradicts the options.
  openssl req -config /dev/null -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -noenc \
    -days "$days" -keyout "$new/$name.key" -out "$new/$name.crt" "$@"
  chmod 644 "$new/$name.crt"
  mv "$new/$name.key" "$new/$name.crt" .
}

server() {
  fresh server.crt server.key
  # A SuperLink's own processes reach it by 127.0.0.1.
  for host in "$@" localhost 127.0.0.1; do
    case $host in
      *:*) kind=IP ;;
      *[!0-9.]*) kind=DNS ;;
      *) kind=IP ;;
    esac
    names=${names:+$names,}$kind:$host
  done
  [ -e ca.crt ] || certify ca 3650 -subj "/CN=llm-flowertune authority" \
    -addext "basicConstraints = critical, CA:TRUE, pathlen:0" \
    -addext "keyUsage = critical, keyCertSign"
  certify server 365 -subj "/CN=llm-flowertune SuperLink" -CA ca.crt -CAkey ca.key \
    -addext "subjectAltName = $names" \
    -addext "basicConstraints = critical, CA:FALSE" \
    -addext "extendedKeyUsage = serverAuth"
}

node() {
  for name; do
    fresh "$name.key" "$name.key.pub"
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "$name" -f "$name.key"
  done
}

case "${1-} ${2-}" in
  "server "*) shift && server "$@" ;;
  "node "?*) shift && node "$@" ;;
  *) fail "say 'server [HOST...]' or 'node NAME...'" ;;
esac
