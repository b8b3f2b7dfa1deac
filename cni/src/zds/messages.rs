//! The messages of package `istio.workload.zds`.

use prost::Message;

/// The only protocol version there is.
pub const VERSION_1: i32 = 1;

/// The proxy's first message.
#[derive(Clone, PartialEq, Message)]
pub struct ZdsHello {
    #[prost(int32, tag = "1")]
    pub version: i32,
}

/// Who a pod is.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct WorkloadInfo {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// A pod to serve; its network namespace rides along as a descriptor.
#[derive(Clone, PartialEq, Message)]
pub struct AddWorkload {
    #[prost(string, tag = "1")]
    pub uid: String,
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
}

/// A pod that the agent knows but has no namespace of: whoever serves it goes on.
#[derive(Clone, PartialEq, Message)]
pub struct KeepWorkload {
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// A pod that is gone.
#[derive(Clone, PartialEq, Message)]
pub struct DelWorkload {
    #[prost(string, tag = "2")]
    pub uid: String,
}

/// Every pod there is was named.
#[derive(Clone, PartialEq, Message)]
pub struct SnapshotSent {}

/// What the agent asks of the proxy.
#[derive(Clone, PartialEq, Message)]
pub struct WorkloadRequest {
    #[prost(oneof = "Payload", tags = "1, 2, 3, 5")]
    pub payload: Option<Payload>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Payload {
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
}

/// The proxy's answer; an empty error is success.
#[derive(Clone, PartialEq, Message)]
pub struct Ack {
    #[prost(string, tag = "1")]
    pub error: String,
}

/// The proxy's answer to a request.
#[derive(Clone, PartialEq, Message)]
pub struct WorkloadResponse {
    #[prost(oneof = "Answer", tags = "1")]
    pub payload: Option<Answer>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Answer {
    #[prost(message, tag = "1")]
    Ack(Ack),
}

/// The longest error text, in bytes, such that an answer fits a packet.
const ERROR: usize = 1000;

impl WorkloadResponse {
    /// An acknowledgement, of failure unless `error` is empty; a very long error is cut.
    pub fn ack(error: impl Into<String>) -> Self {
        let mut error = error.into();
        error.truncate(error.floor_char_boundary(ERROR));
        Self {
            payload: Some(Answer::Ack(Ack { error })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_form_has_the_agreed_field_numbers() {
        let del = WorkloadRequest {
            payload: Some(Payload::Del(DelWorkload {
                uid: "u".to_string(),
            })),
        };
        assert_eq!(del.encode_to_vec(), [0x12, 3, 0x12, 1, b'u']);
        let keep = WorkloadRequest {
            payload: Some(Payload::Keep(KeepWorkload {
                uid: "u".to_string(),
            })),
        };
        assert_eq!(keep.encode_to_vec(), [0x2a, 3, 0x0a, 1, b'u']);
        let info = WorkloadInfo {
            name: "n".into(),
            namespace: "s".into(),
            service_account: "a".into(),
        };
        let add = AddWorkload {
            uid: "u".to_string(),
            workload_info: Some(info),
        };
        let add = WorkloadRequest {
            payload: Some(Payload::Add(add)),
        };
        let expected = [
            0x0a, 14, 0x0a, 1, b'u', 0x12, 9, 0x0a, 1, b'n', 0x12, 1, b's', 0x1a, 1, b'a',
        ];
        assert_eq!(add.encode_to_vec(), expected);
        assert_eq!(ZdsHello { version: VERSION_1 }.encode_to_vec(), [8, 1]);
        assert_eq!(WorkloadResponse::ack("").encode_to_vec(), [0x0a, 0]);
    }

    #[test]
    fn a_very_long_error_is_cut_so_that_the_answer_fits_a_packet() {
        let answer = WorkloadResponse::ack("ä".repeat(2000)).encode_to_vec();
        assert!((1000..=1024).contains(&answer.len()), "{}", answer.len());
        assert!(WorkloadResponse::decode(&*answer).is_ok());
    }
}
