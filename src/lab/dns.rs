//! The lab's DNS server: services and nothing else, for uncaptured pods and as what the proxies forward to.

use std::collections::BTreeMap;
use std::io::Result;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, PoisonError, RwLock};

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{RData, Record};

/// Seconds for which an answer may be kept.
const TTL: u32 = 5;
const PORT: u16 = 53;
/// More than this does not fit an answer without EDNS.
const LARGEST: usize = 512;

/// Addresses by name in lower case without the last dot; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Zone(Arc<RwLock<BTreeMap<String, Vec<IpAddr>>>>);

impl Zone {
    /// Replaces all names.
    pub fn replace(&self, names: BTreeMap<String, Vec<IpAddr>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = names;
    }

    fn lookup(&self, name: &str) -> Option<Vec<IpAddr>> {
        let names = self.0.read().unwrap_or_else(PoisonError::into_inner);
        names.get(name.trim_end_matches('.')).cloned()
    }

    /// Answers questions at `addresses` from threads of its own.
    ///
    /// # Errors
    /// When an address cannot be listened on.
    pub fn serve(&self, addresses: &[IpAddr]) -> Result<()> {
        for address in addresses {
            let socket = UdpSocket::bind(SocketAddr::from((*address, PORT)))?;
            let zone = self.clone();
            std::thread::Builder::new()
                .name("dns".into())
                .spawn(move || zone.answer_all(&socket))?;
        }
        Ok(())
    }

    fn answer_all(&self, socket: &UdpSocket) {
        let mut packet = [0; 4096];
        loop {
            let Ok((length, client)) = socket.recv_from(&mut packet) else {
                continue;
            };
            if let Some(answer) = self.answer(&packet[..length]) {
                // The client asks again when an answer is lost.
                let _ = socket.send_to(&answer, client);
            }
        }
    }

    /// The answer to one packet; `None` for what is no question.
    fn answer(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let question = Message::from_vec(packet).ok()?;
        let asked = question.metadata;
        if asked.message_type != MessageType::Query {
            return None;
        }
        let mut answer = Message::response(asked.id, asked.op_code);
        answer.metadata.recursion_desired = asked.recursion_desired;
        answer.metadata.recursion_available = true;
        let Some(query) = question
            .queries
            .first()
            .filter(|_| asked.op_code == OpCode::Query)
        else {
            answer.metadata.response_code = ResponseCode::NotImp;
            return answer.to_vec().ok();
        };
        answer.add_query(query.clone());
        match self.lookup(&query.name().to_ascii().to_lowercase()) {
            None => answer.metadata.response_code = ResponseCode::NXDomain,
            Some(addresses) => {
                let records = addresses.into_iter().map(|address| match address {
                    IpAddr::V4(address) => RData::A(address.into()),
                    IpAddr::V6(address) => RData::AAAA(address.into()),
                });
                for data in records.filter(|data| data.record_type() == query.query_type()) {
                    answer.add_answer(Record::from_rdata(query.name().clone(), TTL, data));
                }
            }
        }
        let bytes = answer.to_vec().ok()?;
        if bytes.len() <= LARGEST {
            return Some(bytes);
        }
        answer.answers.truncate(16);
        answer.to_vec().ok()
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;
    use hickory_proto::rr::{Name, RecordType};

    use super::*;

    fn ask(zone: &Zone, name: &str, kind: RecordType) -> Message {
        let mut question = Message::query();
        question.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let answer = zone.answer(&question.to_vec().unwrap()).unwrap();
        Message::from_vec(&answer).unwrap()
    }

    #[test]
    fn a_known_name_has_its_address_and_an_unknown_one_does_not_exist() {
        let zone = Zone::default();
        let both: Vec<IpAddr> = ["10.96.3.4", "fd42::1"].map(|a| a.parse().unwrap()).into();
        let one = vec![both[0]];
        zone.replace(BTreeMap::from([
            ("a.b.svc.cluster.local".into(), both.clone()),
            ("one".into(), one),
        ]));
        for (kind, address) in [(RecordType::A, both[0]), (RecordType::AAAA, both[1])] {
            let answer = ask(&zone, "A.b.svc.Cluster.local.", kind);
            assert_eq!(answer.answers.len(), 1);
            assert_eq!(answer.answers[0].data.ip_addr(), Some(address));
        }
        let none = ask(&zone, "one.", RecordType::AAAA);
        assert_eq!(none.metadata.response_code, ResponseCode::NoError);
        assert!(none.answers.is_empty());
        let unknown = ask(&zone, "example.com.", RecordType::A);
        assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn garbage_is_not_answered() {
        assert_eq!(Zone::default().answer(b"no question"), None);
    }

    #[test]
    fn an_answer_that_is_too_long_is_cut() {
        let zone = Zone::default();
        let many = (0..200).map(|i| IpAddr::from([10, 42, 0, i])).collect();
        zone.replace(BTreeMap::from([("many".into(), many)]));
        assert_eq!(ask(&zone, "many.", RecordType::A).answers.len(), 16);
    }
}
