//! The discovery stream, message by message.
//!
//! tonic's own stream keeps a buffer as large as the largest message for as long as it lives, and the first message
//! is the whole mesh. This one gives it back.

use std::convert::Infallible;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderValue, Method, Request, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tower_service::Service;

use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

const PATH: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// The largest message taken, in bytes.
const LARGEST: usize = 200 << 20;
/// Of each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// What the control plane sends.
pub struct Responses {
    body: Body,
    /// What has arrived and is no whole message yet.
    arrived: BytesMut,
}

/// Opens the stream; what comes out of `requests` is sent.
///
/// # Errors
/// The status that the control plane answers instead.
pub async fn open(
    channel: &mut Channel,
    metadata: MetadataMap,
    requests: mpsc::Receiver<DeltaDiscoveryRequest>,
) -> Result<Responses, Status> {
    let frames = ReceiverStream::new(requests)
        .map(|request| Ok::<_, Infallible>(Frame::data(framed(&request))));
    let mut request = Request::new(Body::new(StreamBody::new(frames)));
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = http::Uri::from_static(PATH);
    let headers = request.headers_mut();
    *headers = metadata.into_headers();
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let failed = |error: tonic::transport::Error| Status::from_error(Box::new(error));
    std::future::poll_fn(|cx| channel.poll_ready(cx))
        .await
        .map_err(failed)?;
    let (head, body) = channel.call(request).await.map_err(failed)?.into_parts();
    if let Some(status) = Status::from_header_map(&head.headers)
        && status.code() != Code::Ok
    {
        return Err(status);
    }
    if head.status != http::StatusCode::OK {
        let told = format!("the server answered with HTTP status {}", head.status);
        return Err(Status::unavailable(told));
    }
    Ok(Responses {
        body,
        arrived: BytesMut::new(),
    })
}

fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    bytes.put_u32(length as u32);
    message.encode_raw(&mut bytes);
    bytes.freeze()
}

impl Responses {
    /// Waits for the next message; none at an orderly end.
    ///
    /// # Errors
    /// The status that the stream ended with, or what is wrong with it.
    pub async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        loop {
            if let Some(message) = self.whole()? {
                return Ok(Some(message));
            }
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            match frame?.into_data() {
                Ok(data) => self.arrived.extend_from_slice(&data),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return match Status::from_header_map(&trailers) {
                        Some(status) if status.code() != Code::Ok => Err(status),
                        _ => Ok(None),
                    };
                }
            }
        }
    }

    /// Takes a message off what has arrived, if one is whole.
    fn whole(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let Some((prefix, rest)) = self.arrived.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let [compressed, length @ ..] = *prefix;
        if compressed != 0 {
            return Err(Status::internal("a compressed message was not asked for"));
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > LARGEST {
            let told = format!("a message of {length} bytes is larger than {LARGEST}");
            return Err(Status::out_of_range(told));
        }
        let Some(message) = rest.get(..length) else {
            // At once, so that it does not grow and move piece by piece.
            self.arrived.reserve(PREFIX + length - self.arrived.len());
            return Ok(None);
        };
        let message = DeltaDiscoveryResponse::decode(message)
            .map_err(|error| Status::internal(format!("a message cannot be read: {error}")));
        self.arrived.advance(PREFIX + length);
        self.arrived = BytesMut::from(&self.arrived[..]);
        message.map(Some)
    }
}
