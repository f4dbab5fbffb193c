//! Hosts and ports, as requests and settings write them.
//!
//! An authority is a host and perhaps a port ([RFC 3986 §3.2](https://www.rfc-editor.org/rfc/rfc3986#section-3.2)). The
//! settings need it to read origins, and HTTP needs it to read requests: so it stands below both. User information
//! (`user@host`) is no part of it, since HTTP forbids it (RFC 9110 §4.2.4). On loopback these functions decide which
//! names are this server's: too generous a reading would open it to DNS rebinding.

use std::net::{IpAddr, Ipv6Addr};

/// `uri-host [ ":" port ]` (RFC 9110 §4.2.1), with nothing before or after it.
pub fn is_authority(text: &str) -> bool {
    let (host, port) = split_port(text);
    let inner = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    // Percent-encoded names are left out, too: two readers could disagree about which host one means.
    let is_name = |host: &str| host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
    let is_host = inner.map_or_else(|| is_name(host), |inner| inner.parse::<Ipv6Addr>().is_ok());
    !host.is_empty() && is_host && port.is_none_or(|port| port.is_empty() || port.parse::<u16>().is_ok())
}

/// The host and the port of an authority. A colon inside the brackets of an IPv6 address begins no port: what follows
/// it ends with `]`, which is no digit.
pub fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (host, Some(port)),
        _ => (authority, None),
    }
}

/// Whether the authority of an allowed origin names this one: it is the same, or `*.example.com` stands for every name
/// below example.com, at the same port; not for example.com itself.
pub fn covers(known: &str, authority: &str) -> bool {
    let ((known_host, known_port), (host, port)) = (split_port(known), split_port(authority));
    known_port == port && covers_host(known_host, host)
}

/// The same for hosts alone. Names do not differ in small and capital letters.
pub fn covers_host(known: &str, host: &str) -> bool {
    let Some(above) = known.strip_prefix('*') else { return known.eq_ignore_ascii_case(host) };
    let below = host.len().checked_sub(above.len()).and_then(|at| host.split_at_checked(at));
    below.is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(above) && is_authority(host))
}

/// Whether a host, in brackets if it is an IPv6 address, always means this machine. `localhost` and every name below it
/// do (RFC 6761 §6.3), and so do the IPv4 addresses of loopback mapped into IPv6.
pub fn is_loopback(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase(); // names may end in the root's dot
    let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    name == "localhost" || name.ends_with(".localhost") || address.parse().is_ok_and(is_loopback_address)
}

/// Whether an address is one of loopback: of IPv6, also one of IPv4 mapped into it, as a listener of both has them.
pub fn is_loopback_address(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}
