"""Whether an address can be reached from this machine only."""

import ipaddress


def is_loopback(host: str) -> bool:
    """True for `localhost` and for addresses of the loopback interface.

    Other names are not resolved. The owner of a domain can point it at 127.0.0.1, so a name proves
    nothing about who can reach it.

    Args:
        host: a name or an address without brackets, such as `127.0.0.1`, `::1` or `fe80::1%eth0`.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    # A socket for both protocols reports IPv4 peers as ::ffff:127.0.0.1.
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
