// Allocates, fills, checks and drops, while the collector runs. usage: goheap CONTROL_SOCKET
//
// Four goroutines that live as long as the process, each with blocks of its own: byte slices, trees of small nodes that the
// collector must walk, maps. Every block holds a pattern of its seed; every read checks all of it; what make() gives must be zero.
// Requests: "work SEED TIMES"; "empty" (drops nine blocks of ten, and returns memory to the kernel), "check", "deep N" (a
// stack that the runtime has to grow, which copies it), "fault" (a nil pointer, which becomes a panic by SIGSEGV), each
// answered with the number of wrong bytes and a hash of all live blocks, which is the same in a twin. "churn 1": from now on
// goroutines make garbage, one spins without a call (it can be stopped by SIGURG only), and collections follow one
// another, until "churn 0". "ticks": how often a timer has fired. "returned": MiB that the runtime says it gave back.
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

const (
	workers = 4
	blocks  = 120
)

type node struct {
	left, right *node
	value       uint64
}

type block struct {
	seed  uint64
	bytes []byte
	tree  *node
	table map[uint64][]uint64
}

type worker struct {
	blocks [blocks]*block
	hash   uint64
	wrong  int64
	jobs   chan func(*worker, uint64)
}

var (
	team  [workers]*worker
	ticks int64
	done  sync.WaitGroup
	churn struct {
		stop  chan struct{}
		spin  int32
		ended sync.WaitGroup
		wrong int64
	}
)

func scramble(x uint64) uint64 {
	x = (x^(x>>31))*0x9e3779b97f4a7c15 + 1
	return x ^ (x >> 29)
}

// Half of all words are zero.
func pattern(seed uint64, i int) byte {
	if i%1024 < 512 {
		return byte(scramble(seed + uint64(i/8)))
	}
	return 0
}

func grow(seed uint64, depth int) *node {
	if depth == 0 {
		return nil
	}
	return &node{grow(2*seed, depth-1), grow(2*seed+1, depth-1), scramble(seed)}
}

func (n *node) check(seed uint64, depth int) (wrong int64) {
	if n == nil || depth == 0 {
		if n != nil || depth != 0 {
			return 1
		}
		return 0
	}
	if n.value != scramble(seed) {
		wrong = 1
	}
	return wrong + n.left.check(2*seed, depth-1) + n.right.check(2*seed+1, depth-1)
}

// Small blocks mostly, some of pages, few of more than an arena's chunk.
func sizeOf(x uint64) int {
	kind, more := x%100, int(x/100%4096)
	switch {
	case kind < 60:
		return 16 + more%128*8
	case kind < 85:
		return 1024 + more*8
	case kind < 98:
		return 65536 + more*16
	}
	return 1<<20 + more*512
}

func take(x uint64) (b *block, wrong int64) {
	b = &block{seed: x}
	switch x % 8 {
	case 0:
		b.tree = grow(x, int(4+x/8%8))
	case 1:
		b.table = map[uint64][]uint64{}
		for i := uint64(0); i < 20+x/8%100; i++ {
			b.table[scramble(x+i)] = []uint64{i, x, x ^ i}
		}
	default:
		b.bytes = make([]byte, sizeOf(scramble(x)))
		for i := range b.bytes {
			if b.bytes[i] != 0 {
				wrong++
			}
			b.bytes[i] = pattern(x, i)
		}
	}
	return b, wrong
}

func (b *block) check() (wrong int64) {
	for i := range b.bytes {
		if b.bytes[i] != pattern(b.seed, i) {
			wrong++
		}
	}
	if b.seed%8 == 0 {
		wrong += b.tree.check(b.seed, int(4+b.seed/8%8))
	}
	for i := uint64(0); b.table != nil && i < 20+b.seed/8%100; i++ {
		row := b.table[scramble(b.seed+i)]
		if len(row) != 3 || row[0] != i || row[1] != b.seed || row[2] != b.seed^i {
			wrong++
		}
	}
	return wrong
}

func (w *worker) work(x uint64, times int) {
	for i := 0; i < times; i++ {
		slot := x % blocks
		x = scramble(x + uint64(i))
		if b := w.blocks[slot]; b != nil {
			w.wrong += b.check()
			w.blocks[slot] = nil
			continue
		}
		b, wrong := take(x)
		w.blocks[slot], w.wrong = b, w.wrong+wrong
	}
}

func (w *worker) check() {
	w.hash = 0
	for slot, b := range w.blocks {
		if b != nil {
			w.wrong += b.check()
			w.hash = scramble(w.hash ^ b.seed ^ uint64(slot))
		}
	}
}

func (w *worker) run(number uint64) {
	for job := range w.jobs {
		job(w, number)
		w.check()
		done.Done()
	}
}

// Frames of a few hundred bytes that are looked at again on the way back.
func deep(n int) uint64 {
	var frame [32]uint64
	for i := range frame {
		frame[i] = scramble(uint64(n*32 + i))
	}
	sum := uint64(0)
	if n > 0 {
		sum = deep(n - 1)
	}
	for i := range frame {
		if frame[i] != scramble(uint64(n*32+i)) {
			atomic.AddInt64(&churn.wrong, 1)
		}
		sum = scramble(sum ^ frame[i])
	}
	return sum
}

func fault() (text string) {
	defer func() { text = fmt.Sprint(recover()) }()
	var nowhere *node
	return fmt.Sprint(nowhere.value)
}

func churnOn() {
	churn.stop = make(chan struct{})
	atomic.StoreInt32(&churn.spin, 1)
	loop := func(body func(uint64)) {
		churn.ended.Add(1)
		go func() {
			defer churn.ended.Done()
			for x := uint64(1); ; x = scramble(x) {
				select {
				case <-churn.stop:
					return
				default:
					body(x)
				}
			}
		}()
	}
	for i := 0; i < 3; i++ {
		var kept [64]*block
		loop(func(x uint64) {
			slot := x / 8 % 64
			if kept[slot] != nil {
				atomic.AddInt64(&churn.wrong, kept[slot].check())
			}
			b, wrong := take(x)
			kept[slot] = b
			atomic.AddInt64(&churn.wrong, wrong)
		})
	}
	loop(func(uint64) { runtime.GC() })
	churn.ended.Add(1)
	go func() {
		defer churn.ended.Done()
		for atomic.LoadInt32(&churn.spin) != 0 {
		}
	}()
}

func churnOff() {
	atomic.StoreInt32(&churn.spin, 0)
	close(churn.stop)
	churn.ended.Wait()
}

func all(job func(*worker, uint64)) {
	done.Add(workers)
	for _, w := range team {
		w.jobs <- job
	}
	done.Wait()
}

func answer(line string) string {
	var name string
	var first uint64
	var times int
	fmt.Sscan(line, &name, &first, &times)
	extra := ""
	switch name {
	case "work":
		all(func(w *worker, number uint64) { w.work(scramble(first*workers+number), times) })
	case "empty":
		all(func(w *worker, _ uint64) {
			for slot := range w.blocks {
				if slot%10 != 0 {
					w.blocks[slot] = nil
				}
			}
		})
		debug.FreeOSMemory()
	case "deep":
		sums := make(chan uint64)
		go func() { sums <- deep(int(first)) }()
		extra = fmt.Sprintf(" %x", <-sums)
	case "fault":
		extra = " " + fault()
	case "churn":
		if first == 1 {
			churnOn()
		} else {
			churnOff()
		}
	case "ticks":
		return fmt.Sprint(atomic.LoadInt64(&ticks))
	case "returned":
		var about runtime.MemStats
		runtime.ReadMemStats(&about)
		return fmt.Sprint(about.HeapReleased >> 20)
	default:
		all(func(*worker, uint64) {})
	}
	hash, wrong := uint64(0), atomic.LoadInt64(&churn.wrong)
	for _, w := range team {
		hash = scramble(hash ^ w.hash)
		wrong += w.wrong
	}
	return fmt.Sprintf("%d wrong, %x%s", wrong, hash, extra)
}

func main() {
	runtime.GOMAXPROCS(4)
	for i := range team {
		team[i] = &worker{jobs: make(chan func(*worker, uint64))}
		go team[i].run(uint64(i))
	}
	go func() {
		for range time.Tick(5 * time.Millisecond) {
			atomic.AddInt64(&ticks, 1)
		}
	}()
	listener, err := net.Listen("unix", os.Args[1])
	if err != nil {
		panic(err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		line, err := bufio.NewReader(connection).ReadString('\n')
		if err != nil {
			panic(err)
		}
		fmt.Fprint(connection, answer(line))
		connection.Close()
	}
}
