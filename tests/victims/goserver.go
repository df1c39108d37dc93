// usage: goserver PORT_FILE: an HTTP server with a heap of objects, a goroutine for each request, and the collector.
package main

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"sort"
	"strconv"
	"sync/atomic"
	"time"
)

var (
	data   = map[string][]uint64{}
	served int64
	ticks  int64
)

func digest() string {
	keys := make([]string, 0, len(data))
	for key := range data {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	hash := sha256.New()
	for _, key := range keys {
		fmt.Fprintln(hash, key, data[key])
	}
	return fmt.Sprintf("%x", hash.Sum(nil))
}

func mix(n uint64) string {
	for i := uint64(0); i < 5000; i++ {
		n = (n^(n>>29))*0xbf58476d1ce4e5b9 + i
		n ^= uint64(len(data["key"+strconv.FormatUint(n%100, 10)]))
	}
	return strconv.FormatUint(n, 10)
}

// Allocates n MiB, most of it garbage, and collects; the sum tells whether the live part was kept intact.
func garbage(n int) string {
	var live [][]byte
	for i := 0; i < n; i++ {
		block := make([]byte, 1<<20)
		block[i%len(block)] = byte(i)
		if i%16 == 0 {
			live = append(live, block)
		}
	}
	runtime.GC()
	sum := 0
	for _, block := range live {
		for _, value := range block {
			sum += int(value)
		}
	}
	return strconv.Itoa(sum)
}

func answer(response http.ResponseWriter, request *http.Request) {
	n, _ := strconv.Atoi(request.URL.Query().Get("n"))
	atomic.AddInt64(&served, 1)
	response.Header().Set("Connection", "close")
	switch request.URL.Path {
	case "/digest":
		fmt.Fprint(response, digest())
	case "/mix":
		fmt.Fprint(response, mix(uint64(n)))
	case "/garbage":
		fmt.Fprint(response, garbage(n))
	case "/ticks":
		fmt.Fprint(response, atomic.LoadInt64(&ticks))
	default:
		fmt.Fprint(response, atomic.LoadInt64(&served))
	}
}

func main() {
	for i := uint64(0); i < 20000; i++ {
		data["key"+strconv.FormatUint(i, 10)] = []uint64{i, i * i, ^i, i % 7}
	}
	go func() {
		for range time.Tick(10 * time.Millisecond) {
			atomic.AddInt64(&ticks, 1)
		}
	}()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	port := strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	if os.WriteFile(os.Args[1]+".new", []byte(port), 0o644) != nil || os.Rename(os.Args[1]+".new", os.Args[1]) != nil {
		panic("the port file")
	}
	panic(http.Serve(listener, http.HandlerFunc(answer)))
}
