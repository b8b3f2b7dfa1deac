// Command cluster runs a Kubernetes control plane for tests: etcd and the API server, in one process, on loopback. It
// has no controllers, no scheduler and no nodes: whoever uses it does their part through the API.
//
// It prints "ready KUBECONFIG" when it serves. At its standard input it takes commands, one a line, and answers each
// with a line ("compact": forget all revisions but the last); when that input ends, so does the program, so it never
// outlives whoever started it.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// What the API server may take to start, and to end.
const (
	starting = 2 * time.Minute
	ending   = 5 * time.Second
)

type settings struct {
	dir     string
	address string
	port    int
	keep    bool
	// Further flags of the API server.
	flags []string
}

func main() {
	var s settings
	flag.StringVar(&s.dir, "dir", "", "where everything is kept; required")
	flag.StringVar(&s.address, "address", "127.0.0.1", "the address that the API server serves")
	flag.IntVar(&s.port, "port", 0, "the port that the API server serves; 0: a free one")
	flag.BoolVar(&s.keep, "keep", false, "keep the data at the end, for another start in the same place")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: cluster --dir DIR [flags] [-- flags of the API server]")
		flag.PrintDefaults()
	}
	flag.Parse()
	s.flags = flag.Args()
	if s.dir == "" {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(s); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(s settings) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	commands := readLines(os.Stdin, stop)

	dir, err := filepath.Abs(s.dir)
	if err != nil {
		return err
	}
	s.dir = filepath.Join(dir, "cluster")
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if !s.keep {
		defer os.RemoveAll(s.dir)
	}
	if s.port == 0 {
		if s.port, err = freePort(s.address); err != nil {
			return err
		}
	}
	keys, err := makeKeys(s.dir, s.address)
	if err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	store, err := startStore(filepath.Join(s.dir, "etcd"))
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer store.close()

	serving, abandon := context.WithCancel(ctx)
	defer abandon()
	ended := make(chan error, 1)
	go func() { ended <- serve(serving, s, keys, store.endpoint) }()
	kubeconfig, err := keys.writeKubeconfig(s)
	if err != nil {
		return err
	}
	ready := make(chan error, 1)
	go func() { ready <- awaitReady(serving, s, keys) }()

	for {
		select {
		case err := <-ended:
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("the API server ended: %w", err)
		case err := <-ready:
			if ctx.Err() == nil && err != nil {
				return err
			}
			if err == nil {
				fmt.Println("ready", kubeconfig)
			}
			ready = nil
		case command := <-commands:
			if err := store.obey(ctx, command); err != nil {
				fmt.Println("error:", err)
			}
		case <-ctx.Done():
			// Watches that clients keep open would have it wait for a minute.
			select {
			case <-ended:
			case <-time.After(ending):
			}
			return nil
		}
	}
}

// readLines gives the lines of an input, and calls then when it has ended.
func readLines(input io.Reader, then func()) <-chan string {
	lines := make(chan string)
	go func() {
		scanner := bufio.NewScanner(input)
		for scanner.Scan() {
			lines <- scanner.Text()
		}
		then()
	}()
	return lines
}
