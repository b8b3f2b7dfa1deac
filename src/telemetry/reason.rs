//! Why flows are refused or break: one stable code each, in the log, in the metrics and in the answer to a CONNECT.

use hbone::{CarryError, OpenError};

/// A reason; its code never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A DENY policy matched.
    PolicyDenied,
    /// There are ALLOW policies, and none matched.
    PolicyNotAllowed,
    /// A policy has not arrived yet.
    PolicyMissing,
    /// Allowed once, and no longer.
    PolicyChanged,
    /// `OUTBOUND_DENY` forbids the destination.
    EgressDenied,
    /// The mesh does not know the destination, and must.
    EgressUnknown,
    /// The budget of flows is used up.
    TooManyFlows,
    /// The budget of memory is used up.
    OutOfMemory,
    /// The service has no endpoint that can take the flow.
    NoEndpoint,
    /// The waypoint is unknown, or has no endpoint.
    NoWaypoint,
    /// The gateway of another network is unknown, or has no endpoint.
    NoGateway,
    /// What is meant has no address.
    NoAddress,
    /// Only services can be reached on other networks.
    NoService,
    /// It is not known who would have to answer.
    NobodyExpected,
    /// The pod's own record has not arrived.
    UnknownSelf,
    /// The flow asks for one of Warren's own ports.
    Loop,
    /// What was asked cannot be understood.
    BadRequest,
    /// The address asked for is not served here.
    WrongAddress,
    /// The name asked for means nothing here.
    UnknownHost,
    /// The service has no such port here.
    UnknownPort,
    /// Nobody answers at the address.
    Unreachable,
    /// Nobody answers at the address in time.
    TimedOut,
    /// The ends could not prove themselves to each other.
    Handshake,
    /// A certificate is revoked.
    Revoked,
    /// A certificate of the tunnel has expired.
    Expired,
    /// There is no certificate for the pod.
    NoCertificate,
    /// The pod's own certificate cannot be used.
    BadCertificate,
    /// The tunnel failed.
    Http2,
    /// The peer refused and did not say why in our terms.
    Refused,
    /// The peer did not answer the CONNECT.
    NoAnswer,
    /// The flow broke off.
    Broken,
    /// The client went away before the flow was open.
    ClientGone,
    /// The proxy is stopping.
    Draining,
}

/// Each with its code and its `response_flags` for the traffic metrics.
const ALL: [(Reason, &str, &str); 33] = [
    (Reason::PolicyDenied, "policy_denied", "DENY"),
    (Reason::PolicyNotAllowed, "policy_not_allowed", "DENY"),
    (Reason::PolicyMissing, "policy_missing", "DENY"),
    (Reason::PolicyChanged, "policy_changed", "DENY"),
    (Reason::EgressDenied, "egress_denied", "DENY"),
    (Reason::EgressUnknown, "egress_unknown", "DENY"),
    (Reason::TooManyFlows, "too_many_flows", "OVERLOADED"),
    (Reason::OutOfMemory, "out_of_memory", "OVERLOADED"),
    (Reason::NoEndpoint, "no_endpoint", "CONNECT"),
    (Reason::NoWaypoint, "no_waypoint", "CONNECT"),
    (Reason::NoGateway, "no_gateway", "CONNECT"),
    (Reason::NoAddress, "no_address", "CONNECT"),
    (Reason::NoService, "no_service", "CONNECT"),
    (Reason::NobodyExpected, "nobody_expected", "CONNECT"),
    (Reason::UnknownSelf, "unknown_self", "CONNECT"),
    (Reason::Loop, "loop", "CONNECT"),
    (Reason::BadRequest, "bad_request", "CONNECT"),
    (Reason::WrongAddress, "wrong_address", "CONNECT"),
    (Reason::UnknownHost, "unknown_host", "CONNECT"),
    (Reason::UnknownPort, "unknown_port", "CONNECT"),
    (Reason::Unreachable, "unreachable", "CONNECT"),
    (Reason::TimedOut, "timed_out", "NETWORK_POLICY"),
    (Reason::Handshake, "handshake", "CONNECT"),
    (Reason::Revoked, "revoked", "CERT_REVOKED"),
    (Reason::Expired, "expired", "CERT_EXPIRED"),
    (Reason::NoCertificate, "no_certificate", "IDENTITY_ERROR"),
    (Reason::BadCertificate, "bad_certificate", "TLS_FAILURE"),
    (Reason::Http2, "http2", "H2_HANDSHAKE_FAILURE"),
    (Reason::Refused, "refused", "CONNECT"),
    (Reason::NoAnswer, "no_answer", "CONNECT"),
    (Reason::Broken, "broken", "CONNECT"),
    (Reason::ClientGone, "client_gone", "CONNECT"),
    (Reason::Draining, "draining", "CONNECT"),
];

impl Reason {
    /// The code.
    pub fn code(self) -> &'static str {
        ALL[self as usize].1
    }

    /// The response flag.
    pub fn flag(self) -> &'static str {
        ALL[self as usize].2
    }

    /// The reason of a code that a peer gives.
    pub fn of_code(code: &str) -> Option<Self> {
        let found = ALL.iter().find(|(_, known, _)| *known == code);
        found.map(|(reason, ..)| *reason)
    }
}

impl From<&OpenError> for Reason {
    fn from(error: &OpenError) -> Self {
        match error {
            OpenError::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                Self::Handshake
            }
            OpenError::Io(_) => Self::Unreachable,
            OpenError::ConnectTimeout(_) => Self::TimedOut,
            OpenError::Tls(_) => Self::BadCertificate,
            OpenError::Identity(_) => Self::NoCertificate,
            OpenError::Http2(_) | OpenError::H2(_) => Self::Http2,
            OpenError::Status(_, code) => code
                .as_deref()
                .and_then(Self::of_code)
                .unwrap_or(Self::Refused),
            OpenError::AnswerTimeout(_) => Self::NoAnswer,
            OpenError::Revoked(_) => Self::Revoked,
            OpenError::Draining => Self::Draining,
        }
    }
}

impl From<&CarryError> for Reason {
    fn from(error: &CarryError) -> Self {
        match error {
            CarryError::Revoked => Self::Revoked,
            CarryError::Expired => Self::Expired,
            CarryError::Tunnel(_) | CarryError::Read(_) | CarryError::Write(_) => Self::Broken,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_code() {
        for (place, (reason, code, _)) in ALL.iter().enumerate() {
            assert_eq!(*reason as usize, place);
            assert_eq!(Reason::of_code(code), Some(*reason));
        }
        assert_eq!(Reason::of_code("unheard of"), None);
    }
}
