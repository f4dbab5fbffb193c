//! Hosts and ports, as requests and settings write them.
//!
//! An authority is a host and perhaps a port ([RFC 3986 §3.2](https://www.rfc-editor.org/rfc/rfc3986#section-3.2)). The
//! settings need it to read origins, and HTTP needs it to read requests: so it stands below both.

use std::net::{IpAddr, Ipv6Addr};

/// `uri-host [ ":" port ]` (RFC 9110 §4.2.1), with nothing before or after it.
pub fn is_authority(text: &str) -> bool {
    let (host, port) = split_port(text);
    let inner = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let is_name = |host: &str| host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
    let is_host = inner.map_or_else(|| is_name(host), |inner| inner.parse::<Ipv6Addr>().is_ok());
    !host.is_empty() && is_host && port.is_none_or(|port| port.is_empty() || port.parse::<u16>().is_ok())
}

/// The host and the port of an authority.
pub fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (host, Some(port)),
        _ => (authority, None),
    }
}

pub fn is_loopback(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase(); // names may end in the root's dot
    let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    name == "localhost"
        || name.ends_with(".localhost")
        || address.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}
