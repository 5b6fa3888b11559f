# Of the packaged seccomp profile, the one for containers: fewer socket families,
# no namespaces, no mounts (README.md, "Fences"). It only takes away; the action
# of what no rule allows is the packaged default, ENOSYS. No rule denies what
# another one allows in part: libseccomp says of that nothing one could build on.

# Sockets of the host's (AF_VSOCK 40), of kernel parsers (AF_ALG 38), of raw frames (AF_PACKET 17), …
def sockets: ["socket", "socketcall"];
def spaces: ["clone", "clone3", "unshare", "setns",
	"mount", "umount", "umount2", "pivot_root", "open_tree", "open_tree_attr", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr"];
# They open sockets and files past every filter on arguments.
def rings: ["io_uring_setup", "io_uring_enter", "io_uring_register"];
def eq($index; $value): {index: $index, value: $value, valueTwo: 0, op: "SCMP_CMP_EQ"};
def rule($names; $action; $args; $includes; $excludes): {names: $names, action: $action, args: $args, comment: "", includes: $includes, excludes: $excludes};
def allow($names; $args; $includes; $excludes): rule($names; "SCMP_ACT_ALLOW"; $args; $includes; $excludes);
def audit: {caps: ["CAP_AUDIT_WRITE"]};

if .defaultAction != "SCMP_ACT_ERRNO" or (.syscalls | length) < 20 then error("the packaged profile is of another form") else . end
# The 32 bit entry has socketcall, whose arguments no filter sees; the kernel turns it off on SNP and TDX anyway.
| .archMap |= map(select(.architecture == "SCMP_ARCH_X86_64") | .subArchitectures = [])
| .syscalls |= map(.names -= (sockets + spaces + rings) | select(.names != []))
| .syscalls += [
	# AF_UNIX, AF_INET, AF_INET6; AF_NETLINK but for audit (9), as packaged.
	(1, 2, 10 | allow(["socket"]; [eq(0; .)]; {}; {})),
	allow(["socket"]; [eq(0; 16), {index: 2, value: 9, valueTwo: 0, op: "SCMP_CMP_NE"}]; {}; audit),
	allow(["socket"]; [eq(0; 16)]; audit; {}),
	rule(["socket"]; "SCMP_ACT_ERRNO"; [eq(0; 16), eq(2; 9)]; {}; audit) + {errnoRet: 22, errno: "EINVAL"},
	# Threads and processes: no flag of CLONE_NEW* (their mask). clone3 keeps ENOSYS: libcs then take clone.
	allow(["clone"]; [{index: 0, value: 2114060288, valueTwo: 0, op: "SCMP_CMP_MASKED_EQ"}]; {}; {}),
	rule(spaces - ["clone", "clone3"]; "SCMP_ACT_ERRNO"; []; {}; {}) + {errnoRet: 1, errno: "EPERM"}]
