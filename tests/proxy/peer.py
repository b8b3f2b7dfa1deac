"""An HBONE peer of another make: TLS by the ssl module, HTTP/2 by the h2 package.

    peer.py client FOLDER EXPECTED ADDRESS AUTHORITY   sends a MiB to an echo, ends, and reads it back
    peer.py server FOLDER EXPECTED ADDRESS AUTHORITY   serves one CONNECT by echoing it to its end

FOLDER holds root.pem, cert.pem and key.pem; EXPECTED is the identity that the other end must prove. What was done is
printed as a line: how many bytes came, and their SHA-256.
"""

import hashlib
import socket
import ssl
import sys

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, ResponseReceived, StreamEnded, StreamReset

LENGTH = 1 << 20


class Tunnel:
    """One connection with one stream."""

    def __init__(self, role, folder, expected, connection):
        client = role == "client"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if client else ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(f"{folder}/root.pem")
        context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
        context.set_alpn_protocols(["h2"])
        # Without a server name, as the peers of a mesh do it.
        self.socket = context.wrap_socket(connection, server_side=not client)
        names = self.socket.getpeercert()["subjectAltName"]
        assert names == (("URI", expected),), names
        assert self.socket.selected_alpn_protocol() == "h2"
        # The library's checks know nothing of CONNECT (RFC 9113 section 8.5).
        config = H2Configuration(client_side=client, header_encoding="utf-8",
                                 validate_outbound_headers=False, validate_inbound_headers=False)
        self.h2 = H2Connection(config)
        self.h2.initiate_connection()
        self.events = self.listen()
        self.unsent = bytearray()
        self.ending = self.ended = False
        self.received = hashlib.sha256()
        self.length = 0

    def listen(self):
        """What the peer says; whatever is to be said is sent before."""
        while True:
            self.flush()
            data = self.socket.recv(65536)
            assert data, "the peer closed the tunnel"
            yield from self.h2.receive_data(data)

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def wait(self, kind):
        """The stream and the headers of the first event of a kind."""
        event = next(event for event in self.events if isinstance(event, kind))
        return event.stream_id, dict(event.headers)

    def push(self, stream):
        """Sends as much as the windows allow, and the end behind the last byte."""
        while self.unsent:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room == 0:
                return
            self.h2.send_data(stream, bytes(self.unsent[:room]))
            del self.unsent[:room]
        if self.ending and not self.ended:
            self.h2.end_stream(stream)
            self.ended = True

    def carry(self, stream, echo):
        """Moves bytes until both directions have ended."""
        over = False
        while True:
            self.push(stream)
            if over and self.ended:
                return self.flush()
            event = next(self.events)
            assert not isinstance(event, StreamReset), event
            if isinstance(event, DataReceived):
                self.received.update(event.data)
                self.length += len(event.data)
                self.h2.acknowledge_received_data(event.flow_controlled_length, stream)
                if echo:
                    self.unsent += event.data
            elif isinstance(event, StreamEnded):
                over = self.ending = True


def run(role, folder, expected, address, authority):
    host, port = address.rsplit(":", 1)
    if role == "client":
        tunnel = Tunnel(role, folder, expected, socket.create_connection((host, int(port))))
        stream = tunnel.h2.get_next_available_stream_id()
        tunnel.h2.send_headers(stream, [(":method", "CONNECT"), (":authority", authority)])
        _, headers = tunnel.wait(ResponseReceived)
        assert headers[":status"] == "200", headers
        sent = bytes(i * i % 251 for i in range(LENGTH))
        tunnel.unsent += sent
        tunnel.ending = True
        tunnel.carry(stream, echo=False)
        assert tunnel.received.digest() == hashlib.sha256(sent).digest()
    else:
        listener = socket.create_server((host, int(port)))
        print("listening", flush=True)
        tunnel = Tunnel(role, folder, expected, listener.accept()[0])
        stream, headers = tunnel.wait(RequestReceived)
        assert headers[":method"] == "CONNECT" and headers[":authority"] == authority, headers
        tunnel.h2.send_headers(stream, [(":status", "200")])
        tunnel.carry(stream, echo=True)
    print("carried", tunnel.length, tunnel.received.hexdigest(), flush=True)


run(*sys.argv[1:])
