# usage: dash counter.sh REQUESTS ANSWERS: counts the lines that come through a FIFO.
exec 3<>"$1" 4>>"$2"
n=0
echo ready >&4
while read -r line <&3; do
	n=$((n + 1))
	echo "count $n $line" >&4
done
