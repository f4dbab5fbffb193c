#!/bin/sh
# Installs, on Debian, what the tests need beside Rust. The one list of it: a command, and the package that has it. Only
# what is missing is installed, for it may well be here by other ways.
set -eu
PATH=$PATH:/usr/sbin
packages=''
while read -r command package; do
    command -v "$command" >/dev/null || packages="$packages $package"
done <<'LIST'
curl            curl
perl            perl
php             php-cli
lua5.4          lua5.4
patch           patch
strace          strace
faketime        faketime
setpriv         util-linux
nginx           nginx
caddy           caddy
chromium        chromium
node            nodejs
npm             npm
slowhttptest    slowhttptest
redis-server    redis-server
redis-cli       redis-tools
openssl         openssl
LIST
python3 -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3-venv"
lua5.4 -e "require 'socket'" 2>/dev/null || packages="$packages lua-socket"
if [ -z "$packages" ]; then
    echo 'setup: everything is here'
    exit
fi
if ! command -v apt-get >/dev/null; then
    echo "setup: this is no Debian: install by its own means what these packages hold:$packages" >&2
    exit 1
fi
sudo=''
[ "$(id -u)" = 0 ] || sudo=sudo
$sudo apt-get update
# shellcheck disable=SC2086 # words, both of them
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $packages
case $packages in
*nginx*|*caddy*|*redis*)
    if [ -d /run/systemd/system ]; then
        echo 'setup: Debian starts nginx, caddy and redis as services; the tests need none: systemctl disable --now nginx caddy redis'
    fi ;;
esac
