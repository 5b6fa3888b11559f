package seedcmd

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/kdomanski/iso9660"

	"github.com/cc-runtime/cvm-agent/initrd/seed"
)

// Label is the volume label of the images that we write.
const Label = "CIDATA"

// Where the library writes the time of day into the primary volume descriptor,
// and the name of the system that it ran on (ECMA-119, 8.4).
const (
	descriptor     = 16 * 2048
	systemFrom     = descriptor + 8
	systemTo       = descriptor + 40
	datesFrom      = descriptor + 813
	datesTo        = descriptor + 881
	unspecifiedDay = "0000000000000000\x00" // 8.4.26.1: not specified
)

// WriteISO returns the image with the files. The same files give the same bytes.
func WriteISO(files seed.Files) (image []byte, err error) {
	w, err := iso9660.NewWriter()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Cleanup()) }()
	for _, name := range []string{seed.MetaDataFile, seed.NetworkConfigFile, seed.UserDataFile} {
		data, there := files[name]
		if !there {
			continue
		}
		if err := w.AddFile(bytes.NewReader(data), name); err != nil {
			return nil, err
		}
	}
	var out bytes.Buffer
	if err := w.WriteTo(&out, Label); err != nil {
		return nil, err
	}
	image = out.Bytes()
	copy(image[systemFrom:systemTo], bytes.Repeat([]byte{' '}, systemTo-systemFrom))
	copy(image[datesFrom:datesTo], bytes.Repeat([]byte(unspecifiedDay), 4))
	return image, check(image, files)
}

// check reads the image as the guest will.
func check(image []byte, files seed.Files) error {
	if !seed.IsSeed(bytes.NewReader(image)) {
		return errors.New("the image that was written is no seed")
	}
	got, err := seed.ReadISO(bytes.NewReader(image))
	if err != nil {
		return err
	}
	for name, data := range files {
		if !slices.Equal(got[name], data) {
			return fmt.Errorf("%s does not survive the image", name)
		}
	}
	return nil
}
