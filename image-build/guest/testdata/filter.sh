#!/bin/sh
# filter.sh ROOT: in namespaces of its own (net, mount, pid). A host, a guest and a
# container; says with lines "try …" who reaches what, without and with the filter.
set -eu
R=$1
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/nv
ip link set lo up
ip netns add ctr
ip netns add hostns
ip link add eth0 type veth peer name h0 netns hostns
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip -n hostns addr add 10.0.2.2/24 dev h0
ip -n hostns link set h0 up
ip -n hostns link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
mount --rbind /dev "$R/dev"
mount --rbind /proc "$R/proc"
mount --rbind /sys "$R/sys"
mount --rbind /run "$R/run"
image() { chroot "$R" /usr/bin/env PATH=/usr/sbin:/usr/bin "$@"; }
cat >/run/net.json <<'J'
{"container_id":"aaaa1111aaaa1111aaaa1111aaaa1111aaaa1111aaaa1111aaaa1111aaaa1111","container_name":"c",
"networks":{"podman":{"static_ips":["10.88.0.5"],"interface_name":"eth0"}},
"port_mappings":[{"host_ip":"","container_port":8080,"host_port":8080,"range":1,"protocol":"tcp"}],
"network_info":{"podman":{"name":"podman","id":"2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9","driver":"bridge","network_interface":"podman0","subnets":[{"subnet":"10.88.0.0/16","gateway":"10.88.0.1"}],"ipv6_enabled":false,"internal":false,"dns_enabled":false,"ipam_options":{"driver":"host-local"}}}}
J
image /usr/lib/podman/netavark --config /run/nv --rootless=false --firewall-driver nftables setup /run/netns/ctr </run/net.json >/dev/null
cat >/run/serve.py <<'P'
import socket, sys, threading
def serve(port, word):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("0.0.0.0", port))
    s.listen(5)
    while True:
        c, _ = s.accept()
        c.send(word.encode())
        c.close()
for p in (8080, 9999):
    threading.Thread(target=serve, args=(p, sys.argv[1] or "port %d" % p)).start()
P
# The address that the host will answer as, if it is asked.
ip -n hostns addr add 10.88.0.5/32 dev lo
ip netns exec ctr chroot "$R" /usr/bin/python3 /run/serve.py "" &
ip netns exec hostns chroot "$R" /usr/bin/python3 /run/serve.py "the host" &
sleep 1
# try WHAT NETNS ADDRESS PORT; netns - is the guest's.
try() {
	in="ip netns exec $2"
	[ "$2" != - ] || in=
	got=$($in chroot "$R" /usr/bin/python3 -c 'import socket, sys
try:
    print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.5).recv(99).decode())
except OSError:
    print("nothing")' "$3" "$4")
	echo "try $1: $got"
}
# The host routes the containers' network to the guest, from its own address.
asks() { # asks WHAT PORT
	ip -n hostns addr del 10.88.0.5/32 dev lo
	ip -n hostns route add 10.88.0.0/16 via 10.0.2.15
	try "$1" hostns 10.88.0.5 "$2"
	ip -n hostns route del 10.88.0.0/16
	ip -n hostns addr add 10.88.0.5/32 dev lo
}
poses() { # the guest's lease has a route to the container by way of the host
	ip route add 10.88.0.0/24 via 10.0.2.2
	try "$1" - 10.88.0.5 9999
	ip route del 10.88.0.0/24
}
asks "open, unpublished by route" 9999
try "open, agent asks the container" - 10.88.0.5 9999
poses "open, agent's route is the host's"
image /usr/sbin/nft -f /usr/lib/cvm-agent/filter.nft
try "fenced, published" hostns 10.0.2.15 8080
try "fenced, agent asks the container" - 10.88.0.5 9999
try "fenced, container asks the host" ctr 10.0.2.2 9999
asks "fenced, unpublished by route" 9999
asks "fenced, published port by route" 8080
poses "fenced, agent's route is the host's"
